//! Capture by somebody else: rules in the pod, such as those of istio-cni, redirect its connections to
//! our ports. Takes pods, gives listeners on those ports and sockets that the rules let through; it
//! changes nothing in the pod, and never listens on another port.

use std::{path::Path, sync::Arc};

use super::{
    Dialer, Error, Netns, NetnsCookie, PodSettings, WorkerListeners,
    dial::Exempt,
    listen::{self, Listening},
    pins,
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
    ) -> Result<(ExternalPod, Vec<WorkerListeners>), Error> {
        let listening = Listening::Redirected {
            mark: self.0.mark,
            reuse_port: self.0.reuse_port,
            ipv6: self.0.ipv6,
        };
        let (listeners, _) = listen::open(netns, self.0.workers, self.0.socks5, listening)?;
        let pod = ExternalPod {
            netns: Arc::clone(netns),
            mark: self.0.mark,
        };
        tracing::info!(cookie = %pod.cookie(), "pod served; somebody else redirects to us");
        Ok((pod, listeners))
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
