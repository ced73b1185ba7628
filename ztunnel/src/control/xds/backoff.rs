//! How long to wait before the next stream. Takes how the last one ended, gives a pause; never waits itself.

use std::time::Duration;

/// Pauses that double while nothing works.
// PROTOCOL.md#xds-reconnect
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { next: FIRST }
    }
}

impl Backoff {
    /// There was no stream, or the control plane refused it.
    pub(super) fn failed(&mut self) -> Duration {
        self.next = (self.next * 2).min(LONGEST);
        jitter(self.next)
    }

    /// A stream that worked for so long ended without a reason against another one; `clean` says that the control
    /// plane ended it in order. One that ends again and again right after its start is treated as a failure.
    pub(super) fn left(&mut self, lived: Duration, clean: bool) -> Duration {
        if lived >= LIVED {
            self.next = FIRST;
            return if clean { Duration::ZERO } else { FIRST };
        }
        let pause = if self.next > FIRST || !clean {
            jitter(self.next)
        } else {
            Duration::ZERO
        };
        self.next = (self.next * 2).min(LONGEST);
        pause
    }
}

/// Nodes that lost the same control plane should not come back together.
fn jitter(pause: Duration) -> Duration {
    pause.mul_f64(1.0 - JITTER + fastrand::f64() * 2.0 * JITTER)
}

const FIRST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(15);
const JITTER: f64 = 0.2;
/// After this a stream has done its work.
const LIVED: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    fn about(pause: Duration, expected: u64) -> bool {
        let expected = Duration::from_millis(expected);
        pause >= expected.mul_f64(0.8) && pause <= expected.mul_f64(1.2)
    }

    #[test]
    fn failures_double_the_pause_up_to_15_seconds() {
        let mut backoff = Backoff::default();
        for expected in [
            20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 15000, 15000,
        ] {
            let pause = backoff.failed();
            assert!(about(pause, expected), "{pause:?} {expected}");
        }
    }

    #[test]
    fn a_stream_that_lived_is_followed_at_once() {
        let mut backoff = Backoff::default();
        for _ in 0..5 {
            let _: Duration = backoff.failed();
        }
        assert_eq!(backoff.left(LIVED, true), Duration::ZERO);
        assert!(about(backoff.failed(), 20), "the doubling began anew");
        assert_eq!(backoff.left(LIVED, false), FIRST);
    }

    #[test]
    fn a_control_plane_that_closes_every_stream_is_not_stormed() {
        let mut backoff = Backoff::default();
        let pauses: Vec<_> = (0..12)
            .map(|_| backoff.left(Duration::ZERO, true))
            .collect();
        assert_eq!(pauses[0], Duration::ZERO, "the first is followed at once");
        assert!(about(pauses[3], 80), "{pauses:?}");
        assert!(about(pauses[11], 15000), "{pauses:?}");
    }
}
