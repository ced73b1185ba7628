//! Capture by somebody else: rules in the pod, such as those of istio-cni, redirect its connections to
//! our ports. Takes pods, gives listeners on those ports and sockets that the rules let through; it
//! changes nothing in the pod, and never listens on another port.

use std::{fs, io, net::IpAddr, path::Path, sync::Arc};

use super::{
    Asking, Dialer, Error, Netns, NetnsCookie, PodSettings, WorkerListeners,
    dial::Exempt,
    listen::{self, Hearing, Listening},
    pins,
    questions::Meant,
};

/// What capture by somebody else must know of this node process.
#[derive(Clone, Copy, Debug)]
pub struct ExternalParams {
    /// How many workers will accept; each gets its own listeners in every pod.
    pub workers: usize,
    /// Whether pods find a SOCKS5 proxy on their loopback device.
    pub socks5: bool,
    /// The mark of our sockets in pods, by which the rules know them.
    pub mark: Option<u32>,
    /// Another process may listen beside us, as during an upgrade.
    pub reuse_port: bool,
    /// Whether to listen on IPv6 too.
    pub ipv6: bool,
    /// Whether to answer questions to resolvers.
    pub dns: bool,
}

/// Capture by somebody else.
#[derive(Clone, Debug)]
pub struct External(ExternalParams);

/// One pod that somebody else captures.
#[derive(Clone, Debug)]
pub struct ExternalPod {
    netns: Arc<Netns>,
    mark: Option<u32>,
}

impl External {
    /// Starts it. Pods that eBPF programs of an earlier process capture would stay closed, so there
    /// must be none.
    ///
    /// # Errors
    /// There are such pods, or the pins cannot be read.
    pub fn start(params: ExternalParams, pin_dir: &Path) -> Result<Self, Error> {
        if pin_dir.exists() {
            let mut pods = 0;
            for generation in pins::generations(pin_dir)? {
                pods += generation.pods()?.len();
            }
            if pods > 0 {
                let path = pin_dir.to_path_buf();
                return Err(Error::PinsHoldPods { path, pods });
            }
        }
        Ok(Self(params))
    }

    pub(super) fn enrol(
        &self,
        netns: &Arc<Netns>,
        settings: &PodSettings,
    ) -> Result<(ExternalPod, Vec<WorkerListeners>), Error> {
        let listening = Listening::Redirected {
            mark: self.0.mark,
            reuse_port: self.0.reuse_port,
            ipv6: self.0.ipv6,
        };
        if settings.excludes_anything() {
            tracing::warn!(
                cookie = %netns.cookie(),
                "the pod's exclusions have no effect: what is redirected is up to the rules in it"
            );
        }
        let hearing = match self.0.dns && settings.dns {
            true => Some(Hearing {
                meant: Meant::Own(resolvers()?.into()),
                asking: Asking::new(true),
            }),
            false => None,
        };
        let opened = listen::open(
            netns,
            self.0.workers,
            self.0.socks5,
            listening,
            hearing.as_ref(),
        )?;
        let pod = ExternalPod {
            netns: Arc::clone(netns),
            mark: self.0.mark,
        };
        tracing::info!(cookie = %pod.cookie(), "pod served; somebody else redirects to us");
        Ok((pod, opened.workers))
    }
}

impl ExternalPod {
    fn cookie(&self) -> NetnsCookie {
        self.netns.cookie()
    }

    pub(super) fn dialer(&self, settings: &PodSettings) -> Dialer {
        Dialer::new(
            Arc::clone(&self.netns),
            Exempt::ByMark,
            self.mark,
            settings.own_addresses(),
        )
    }
}

/// The resolvers of this process, which pods' questions that we cannot answer are passed on to.
// PROTOCOL.md#dns-external
fn resolvers() -> Result<Vec<IpAddr>, Error> {
    let text = match fs::read_to_string(RESOLV_CONF) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(source) => {
            let path = RESOLV_CONF.into();
            return Err(Error::Read { path, source });
        }
    };
    let (elsewhere, here): (Vec<_>, Vec<_>) =
        named(&text).into_iter().partition(is_reached_from_pods);
    if !here.is_empty() || elsewhere.is_empty() {
        tracing::warn!(
            path = RESOLV_CONF, unused = ?here, used = ?elsewhere,
            "a name server on this host's loopback device is none to pods; with none at all, names \
             that the mesh does not know are not resolved"
        );
    }
    Ok(elsewhere)
}

/// In another namespace a loopback address is another host's.
const fn is_reached_from_pods(resolver: &IpAddr) -> bool {
    !resolver.is_loopback() && !resolver.is_unspecified()
}

fn named(text: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let is_server = words.next() == Some("nameserver");
        is_server.then(|| words.next()?.parse().ok()).flatten()
    };
    text.lines()
        .filter_map(server)
        .take(MAX_RESOLVERS)
        .collect()
}

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// As many as resolv.conf(5) may name.
const MAX_RESOLVERS: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_the_first_three_that_have_an_address() {
        let text = "# nameserver 192.0.2.9\nsearch a.b\nnameserver 10.96.0.10\n\
                    nameserver\nnameserver fe80::1%eth0\n  nameserver\tfd00::a # ours\n\
                    nameserver 192.0.2.3\nnameserver 192.0.2.4\n";
        let wanted = ["10.96.0.10", "fd00::a", "192.0.2.3"];
        let wanted: Vec<IpAddr> = wanted.iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(named(text), wanted);
    }
}
