//! Each connection recorded once: counters and the access line. Takes what the walks learn, gives
//! the metrics page and one line per connection; never decides, waits or opens a socket.
//!
//! A [`Book`] belongs to one worker and only that worker writes in it, so counting takes no lock
//! and no cache line that another worker writes. [`Accounts`] is the shelf of all books: a scrape
//! sums them up.

mod access_log;
mod book;
mod labels;
mod ledger;
mod open;
mod page;
mod process;
mod source;

pub use book::{Accounts, Book, Socket};
pub use ledger::{Learned, Ledger, Opening};
pub use open::OpenConnection;
pub use source::{Distribution, Family, Kind, Row, Source};

#[cfg(test)]
mod tests;
