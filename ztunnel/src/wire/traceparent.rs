//! The trace identity of a connection. Takes random numbers or a `traceparent` header, gives the
//! identity and the header; never panics on what a peer wrote, and never draws randomness itself.

use std::fmt;

use http::HeaderValue;

/// A W3C trace context, version 00.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Traceparent {
    trace_id: u128,
    parent_id: u64,
}

impl Traceparent {
    /// Takes two random numbers; zero, which the standard forbids, becomes one.
    #[must_use]
    pub const fn new(trace_id: u128, parent_id: u64) -> Self {
        Self {
            trace_id: if trace_id == 0 { 1 } else { trace_id },
            parent_id: if parent_id == 0 { 1 } else { parent_id },
        }
    }

    /// The id that all connections of one trace share.
    #[must_use]
    pub const fn trace_id(self) -> u128 {
        self.trace_id
    }

    /// The header value: `00-<32 hex>-<16 hex>-00`.
    // PROTOCOL.md#traceparent
    #[must_use]
    pub fn encode(self) -> HeaderValue {
        // Hexadecimal digits and dashes, so the fallback is never taken.
        HeaderValue::try_from(self.to_string()).unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    /// Reads the header; anything malformed is `None`. Flags are not kept.
    // PROTOCOL.md#traceparent
    #[must_use]
    pub fn decode(line: &HeaderValue) -> Option<Self> {
        let text = std::str::from_utf8(line.as_bytes()).ok()?;
        let mut parts = text.split('-');
        let (Some(version), Some(trace_id), Some(parent_id), Some(flags), None) = (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ) else {
            return None;
        };
        let version = hex(version, 2)?;
        let trace_id = hex(trace_id, 32)?;
        let parent_id = u64::try_from(hex(parent_id, 16)?).ok()?;
        hex(flags, 2)?;
        let valid = version != FORBIDDEN_VERSION && trace_id != 0 && parent_id != 0;
        valid.then_some(Self {
            trace_id,
            parent_id,
        })
    }
}

impl fmt::Display for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-00", self.trace_id, self.parent_id)
    }
}

/// Exactly so many lower-case digits.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let lower = |b: u8| b.is_ascii_digit() || matches!(b, b'a'..=b'f');
    (text.len() == digits && text.bytes().all(lower))
        .then(|| u128::from_str_radix(text, 16).ok())
        .flatten()
}

/// W3C trace context 3.2.2.1.
const FORBIDDEN_VERSION: u128 = 0xff;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn version_and_flags_are_zero_and_ids_are_not() {
        assert_eq!(
            Traceparent::new(0xabc, 0xdef).encode(),
            "00-00000000000000000000000000000abc-0000000000000def-00"
        );
        assert_eq!(
            Traceparent::new(0, 0).encode(),
            "00-00000000000000000000000000000001-0000000000000001-00"
        );
    }

    #[test]
    fn a_peers_trace_is_continued() {
        let read = Traceparent::decode(&HeaderValue::from_static(GOOD)).unwrap();
        assert_eq!(read.trace_id(), 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c);
    }

    #[test]
    fn anything_malformed_is_no_trace() {
        let zeros = "0".repeat(55);
        let long = format!("{GOOD}-00");
        let dashes = "-".repeat(55);
        let huge = "a".repeat(60_000);
        for text in [
            "",
            "00",
            &zeros,
            &dashes,
            &long,
            &huge,
            GOOD.strip_suffix('1').unwrap(),
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319-b7ad6b7169203331-011",
            "00-0af7651916cd43dd8448eb211c80319g-b7ad6b7169203331-01",
            "+0-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00_0af7651916cd43dd8448eb211c80319c_b7ad6b7169203331_01",
        ] {
            let line = HeaderValue::from_str(text).unwrap();
            assert_eq!(Traceparent::decode(&line), None, "{text}");
        }
        let bytes = HeaderValue::from_bytes(&[0xff; 55]).unwrap();
        assert_eq!(Traceparent::decode(&bytes), None);
        let split = HeaderValue::from_bytes("0ä-".repeat(20).as_bytes()).unwrap();
        assert_eq!(Traceparent::decode(&split), None);
    }

    proptest! {
        #[test]
        fn it_survives_the_wire(trace_id: u128, parent_id: u64) {
            let sent = Traceparent::new(trace_id, parent_id);
            prop_assert_eq!(Traceparent::decode(&sent.encode()), Some(sent));
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 55)) {
            if let Ok(line) = HeaderValue::from_bytes(&bytes) {
                let read = Traceparent::decode(&line);
                prop_assert_eq!(read.and_then(|r| Traceparent::decode(&r.encode())), read);
            }
        }
    }
}
