//! Host names that stand for addresses in the mesh. Takes a name, gives the addresses that the
//! node's own resolver knows for it; asks it about a few names at a time, and about each seldom.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::net::lookup_host;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use crate::model::{Reason, ToReason};

/// The names that one worker asked for.
#[derive(Debug)]
pub struct Names {
    asking: Semaphore,
    known: RefCell<HashMap<Arc<str>, Known>>,
}

/// Addresses, and until when they are used.
type Known = (Instant, Arc<[IpAddr]>);

impl Default for Names {
    fn default() -> Self {
        Self {
            asking: Semaphore::new(AT_ONCE),
            known: RefCell::default(),
        }
    }
}

impl Names {
    /// The addresses of a name. Cancel safe.
    ///
    /// # Errors
    /// The resolver has no answer, or none in time.
    pub async fn look_up(&self, name: &Arc<str>) -> Result<Arc<[IpAddr]>, NameError> {
        if let Some(known) = self.fresh(name) {
            return Ok(known);
        }
        let asked = async {
            let _turn = self.asking.acquire().await;
            // Whoever went before may have asked for the same name.
            if let Some(known) = self.fresh(name) {
                return Ok(known);
            }
            let answer = lookup_host((&**name, 0)).await?;
            let addresses = answer.map(|addr| addr.ip().to_canonical());
            Ok::<Arc<[IpAddr]>, io::Error>(addresses.collect())
        };
        let unknown = |source| NameError::Unknown {
            name: Arc::clone(name),
            source,
        };
        let addresses = match timeout(PATIENCE, asked).await {
            Ok(answer) => answer.map_err(unknown)?,
            Err(_) => return Err(NameError::TimedOut(Arc::clone(name), PATIENCE)),
        };
        self.remember(name, &addresses);
        Ok(addresses)
    }

    fn fresh(&self, name: &str) -> Option<Arc<[IpAddr]>> {
        let known = self.known.borrow();
        let (until, addresses) = known.get(name)?;
        (Instant::now() < *until).then(|| Arc::clone(addresses))
    }

    fn remember(&self, name: &Arc<str>, addresses: &Arc<[IpAddr]>) {
        let mut known = self.known.borrow_mut();
        if known.len() >= KEPT {
            let now = Instant::now();
            known.retain(|_, (until, _)| now < *until);
        }
        if known.len() < KEPT {
            let until = Instant::now() + FRESH;
            known.insert(Arc::clone(name), (until, Arc::clone(addresses)));
        }
    }
}

/// Why a name has no addresses.
#[derive(Debug, Error)]
pub enum NameError {
    /// The resolver did not answer.
    #[error("no answer for host name {0:?} within {1:?}")]
    TimedOut(Arc<str>, Duration),
    /// The resolver knows no address.
    #[error("look up host name {name:?}")]
    Unknown {
        /// The name.
        name: Arc<str>,
        /// What the resolver said.
        source: io::Error,
    },
}

impl ToReason for NameError {
    fn to_reason(&self) -> Reason {
        match self {
            Self::TimedOut(..) => Reason::ConnectTimedOut,
            Self::Unknown { .. } => Reason::NoEndpoint,
        }
    }
}

/// Questions to the resolver at a time: each keeps a thread busy.
const AT_ONCE: usize = 16;
/// For an answer, and for the turn to ask.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an answer is used. The resolver does not tell for how long it may be.
const FRESH: Duration = Duration::from_secs(5);
/// Names that are remembered.
const KEPT: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_is_asked_for_once_and_then_known_for_a_while() {
        let names = Names::default();
        let name: Arc<str> = "localhost".into();
        let first = names.look_up(&name).await.unwrap();
        assert!(first.iter().all(IpAddr::is_loopback) && !first.is_empty());
        let again = names.look_up(&name).await.unwrap();
        assert!(Arc::ptr_eq(&first, &again), "from memory");
    }

    #[tokio::test]
    async fn what_no_resolver_can_know_is_no_endpoint() {
        // Longer than any name, so that no resolver is asked.
        let nobody: Arc<str> = "x".repeat(300).into();
        let error = Names::default().look_up(&nobody).await.unwrap_err();
        assert_eq!(error.to_reason(), Reason::NoEndpoint, "{error}");
    }
}
