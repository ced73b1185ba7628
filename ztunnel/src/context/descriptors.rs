//! One worker's share of the process's descriptors. Takes attempts to make a socket, gives each
//! that finds no descriptor a second chance; never lets accepted connections take the descriptor
//! without which none of them could go on.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// The descriptors of one worker. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Descriptors(Rc<Held>);

#[derive(Debug, Default)]
struct Held {
    /// Never read; closed for a socket that is needed.
    spare: RefCell<Option<File>>,
    /// Attempts that wait for a descriptor.
    waiting: Cell<usize>,
}

impl Descriptors {
    /// Makes sure that a connection which is accepted now finds a descriptor for its other end.
    ///
    /// # Errors
    /// There is none, or others wait for it.
    pub fn keep_spare(&self) -> io::Result<()> {
        if self.0.waiting.get() > 0 {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        let mut spare = self.0.spare.borrow_mut();
        if spare.is_none() {
            *spare = Some(File::open("/dev/null")?);
        }
        Ok(())
    }

    /// Makes a socket. Without a descriptor, first the spare one is given for it, then it waits a
    /// while for another. Cancel safe.
    ///
    /// # Errors
    /// What the last attempt said.
    pub async fn make<T>(&self, mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let error = match attempt() {
            Err(error) if is_exhausted(&error) => error,
            other => return other,
        };
        drop(error);
        let _waiting = Waiting::new(&self.0.waiting);
        let deadline = Instant::now() + PATIENCE;
        loop {
            drop(self.0.spare.take());
            match attempt() {
                Err(error) if is_exhausted(&error) && Instant::now() < deadline => {}
                other => return other,
            }
            sleep(PAUSE).await;
        }
    }
}

struct Waiting<'a>(&'a Cell<usize>);

impl<'a> Waiting<'a> {
    fn new(count: &'a Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

fn is_exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Shorter than any connect may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    fn exhausted<T>() -> io::Result<T> {
        Err(io::Error::from_raw_os_error(libc::EMFILE))
    }

    #[tokio::test(start_paused = true)]
    async fn the_spare_one_is_given_before_anybody_waits() {
        let descriptors = Descriptors::default();
        descriptors.keep_spare().unwrap();
        let held = Rc::clone(&descriptors.0);
        let begun = Instant::now();
        let attempt = || match &*held.spare.borrow() {
            Some(_) => exhausted(),
            None => Ok(()),
        };
        descriptors.make(attempt).await.unwrap();
        assert_eq!(begun.elapsed(), Duration::ZERO);
        descriptors.keep_spare().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_accepted_while_a_connection_waits_and_it_waits_a_while() {
        let descriptors = Descriptors::default();
        let begun = Instant::now();
        let mut attempts = 0;
        let attempt = || {
            attempts += 1;
            if attempts == 4 { Ok(()) } else { exhausted() }
        };
        let refused = async {
            tokio::task::yield_now().await;
            let refused = descriptors.keep_spare().unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EMFILE));
        };
        let (made, ()) = tokio::join!(descriptors.make(attempt), refused);
        made.unwrap();
        assert_eq!(begun.elapsed(), PAUSE * 2);
        descriptors.keep_spare().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_finds_none_in_time_is_told_so_and_other_errors_come_at_once() {
        let descriptors = Descriptors::default();
        let begun = Instant::now();
        let error = descriptors.make(exhausted::<()>).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMFILE));
        assert!(begun.elapsed() >= PATIENCE);
        let begun = Instant::now();
        let other = || Err::<(), _>(io::ErrorKind::PermissionDenied.into());
        let error = descriptors.make(other).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
