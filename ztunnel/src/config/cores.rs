//! How many workers a node gets that was not told their number. Takes the processors of this host and
//! what the process may use of them, gives the number.

use super::{Env, Error, refused};

/// What is known about processors.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cores {
    /// All that there are.
    pub(super) all: usize,
    limit: Option<usize>,
    request: Option<usize>,
}

impl Cores {
    /// `all` are this host's, unless the environment knows better.
    pub(super) fn new(env: &Env, all: usize) -> Result<Self, Error> {
        let of = |name| env.get(name).map(|value| quantity(name, value)).transpose();
        Ok(Self {
            all: of("ZTUNNEL_CPU_LIMIT")?.unwrap_or(all),
            limit: of("ZTUNNEL_RESOURCE_CPU_LIMIT")?,
            request: of("ZTUNNEL_RESOURCE_CPU_REQUEST")?,
        })
    }

    /// As many workers as the process may keep busy, else a quarter of all, what was requested, and two
    /// at least.
    // PROTOCOL.md#worker-threads
    pub(super) fn workers(self) -> usize {
        let request = self.request.unwrap_or(0);
        match self.limit {
            Some(limit) => limit.max(request),
            None => self.all.div_ceil(4).max(request).max(2),
        }
    }
}

/// Processors as Kubernetes writes them, `1500m` or `1.5`, rounded up.
fn quantity(name: &'static str, value: &str) -> Result<usize, Error> {
    let digits = |text: &str| -> Option<usize> {
        let all = text.bytes().all(|b| b.is_ascii_digit());
        all.then(|| text.parse().ok()).flatten()
    };
    let cores = match value.strip_suffix('m') {
        Some(thousandths) => digits(thousandths).map(|m| m.div_ceil(1000)),
        None => {
            let (whole, part) = value.split_once('.').unwrap_or((value, "0"));
            let more = digits(part).map(|part| usize::from(part > 0));
            digits(whole)
                .zip(more)
                .and_then(|(whole, more)| whole.checked_add(more))
        }
    };
    let cores = cores.filter(|cores| *cores > 0);
    cores.ok_or_else(|| {
        refused(
            name,
            value,
            "must be processors, such as 2, 1.5 or 500m".into(),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_read_as_kubernetes_writes_them() {
        for (value, cores) in [
            ("1", 1),
            ("500m", 1),
            ("1001m", 2),
            ("2.0", 2),
            ("0.1", 1),
            ("16", 16),
        ] {
            assert_eq!(quantity("X", value).unwrap(), cores, "{value}");
        }
        for value in [
            "", "0", "0m", "0.0", "-1", "+1", "1.", ".5", "1e3", "2k", "m", "1.5m", "four",
        ] {
            let error = quantity("X", value).unwrap_err().to_string();
            assert!(error.contains('X'), "{value}: {error}");
        }
    }
}
