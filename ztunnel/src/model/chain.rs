//! An error with its causes as one text. Takes an error, gives what a log line says of it; never on more than one line
//! unless a cause is.

use std::error::Error;
use std::fmt;

/// An error with its causes, for one field of a log line.
#[derive(Debug)]
pub struct Chain<'a>(pub &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("connect")]
    struct Failed(#[source] io::Error);

    #[test]
    fn every_cause_is_said_once() {
        let error = Failed(io::Error::other("refused"));
        assert_eq!(Chain(&error).to_string(), "connect: refused");
    }
}
