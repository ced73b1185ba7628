//! Any bytes are lists that name nobody by accident, or are refused as a whole with the list's number.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustls_pki_types::CertificateDer;
use ztunnel_fuzz::identity::RevocationLists;

fuzz_target!(|bytes: &[u8]| {
    match RevocationLists::parse(bytes) {
        Ok(lists) => {
            assert_eq!(lists.is_empty(), lists.len() == 0);
            // Whatever they hold, they are asked about what a peer shows, which may be anything too.
            let certificate = CertificateDer::from(bytes);
            assert!(lists.naming(&certificate).count() <= lists.len());
        }
        Err(fault) => assert!(fault.to_string().contains("list")),
    }
});
