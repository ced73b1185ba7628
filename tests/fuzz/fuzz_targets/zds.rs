//! Any packet is a request whose pod has all its names, or is refused with a text that fits an answer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ztunnel_fuzz::wire::{MAX_ZDS_BYTES, ZdsRequest, zds_ack};

fuzz_target!(|packet: &[u8]| {
    match ZdsRequest::decode(packet) {
        Ok(ZdsRequest::Add(uid, pod)) => {
            for part in [&uid.0, &pod.name, &pod.namespace, &pod.service_account] {
                assert!(!part.is_empty());
            }
        }
        Ok(ZdsRequest::Delete(uid) | ZdsRequest::Keep(uid)) => assert!(!uid.0.is_empty()),
        Ok(ZdsRequest::SnapshotSent) => {}
        Err(error) => {
            // Only a message can be about a pod.
            assert!(error.is_a_message() || error.unclear_pod().is_none());
            let ack = zds_ack(Err(&error.to_string()));
            assert!(ack.len() <= MAX_ZDS_BYTES && ack.len() > 2);
        }
    }
});
