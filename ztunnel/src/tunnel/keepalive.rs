//! Whether the peer of a tunnel is alive. Takes the pings of an HTTP/2 connection and a count of
//! what was read, gives the moment when hope is lost; never ends a tunnel that still speaks.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep};

use super::params::Params;

/// Sends pings and waits for what comes back.
// PROTOCOL.md#h2-ping
pub(super) struct Keepalive {
    pings: Option<PingPong>,
    /// Counts reads that brought something.
    life: Rc<Cell<u64>>,
    timer: Pin<Box<Sleep>>,
    state: State,
    interval: Duration,
    timeout: Duration,
}

enum State {
    /// Until the timer: nothing to do.
    Resting,
    /// A ping is on its way since then; the timer ends the patience.
    Waiting { since: Instant, life: u64 },
}

impl Keepalive {
    pub(super) fn new(pings: Option<PingPong>, life: Rc<Cell<u64>>, params: &Params) -> Self {
        Self {
            pings,
            life,
            timer: Box::pin(sleep(params.ping_interval)),
            state: State::Resting,
            interval: params.ping_interval,
            timeout: params.ping_timeout,
        }
    }

    /// Ready when neither an answer nor any other byte came in time.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(pings) = &mut self.pings else {
            return Poll::Pending;
        };
        loop {
            match self.state {
                State::Resting => {
                    ready!(self.timer.as_mut().poll(cx));
                    // Refused only while another is on its way: it answers for this one too.
                    if let Err(e) = pings.send_ping(Ping::opaque()) {
                        tracing::trace!(error = %e, "no ping");
                    }
                    let since = Instant::now();
                    self.timer.as_mut().reset(since + self.timeout);
                    let life = self.life.get();
                    self.state = State::Waiting { since, life };
                }
                State::Waiting { since, life } => {
                    if let Poll::Ready(pong) = pings.poll_pong(cx) {
                        if pong.is_err() {
                            // The connection is over, and says so itself.
                            self.pings = None;
                            return Poll::Pending;
                        }
                        self.timer.as_mut().reset(since + self.interval);
                        self.state = State::Resting;
                        continue;
                    }
                    ready!(self.timer.as_mut().poll(cx));
                    let now = self.life.get();
                    if now == life {
                        return Poll::Ready(());
                    }
                    // The answer may wait behind data that is being read.
                    self.timer.as_mut().reset(Instant::now() + self.timeout);
                    self.state = State::Waiting { since, life: now };
                }
            }
        }
    }
}
