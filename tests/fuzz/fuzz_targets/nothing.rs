//! A string of bytes is read as text: shows that the fuzzer is fed and sees coverage.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    assert!(
        text.chars().count() <= bytes.len(),
        "one byte makes at most one character"
    );
});
