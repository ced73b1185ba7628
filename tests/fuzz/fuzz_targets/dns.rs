//! Whatever asks us is answered within its limits, or refused; and what we say can be read.
#![no_main]

use domain::base::Message;
use libfuzzer_sys::fuzz_target;
use ztunnel_fuzz::wire::dns::{Failed, Known, Read, Transport, answer, answers, failure, read};

fuzz_target!(|bytes: &[u8]| {
    let refused = failure(bytes, Failed::Format);
    let is_answer = bytes.get(2).is_some_and(|flags| flags & 0x80 != 0);
    assert_eq!(refused.is_some(), bytes.len() >= 12 && !is_answer);
    if let Some(refused) = &refused {
        assert!(refused.len() <= 512);
        assert!(answers(bytes, refused));
    }
    let Ok(Read::Addresses(question)) = read(bytes) else {
        return;
    };
    assert!(question.name.len() < 255);
    assert!(!question.name.ends_with('.'));
    assert_eq!(question.name, question.name.to_ascii_lowercase());
    for canonical in [None, Some("www.example.com".to_owned())] {
        let known = Known {
            canonical,
            addresses: (0..200).map(|n| [10, 0, 0, n].into()).collect(),
        };
        for (by, limit) in [(Transport::Udp, 4096), (Transport::Tcp, 65_535)] {
            let ours = answer(bytes, &known, by).expect("a question that was read is answered");
            assert!(ours.len() <= limit);
            assert!(answers(bytes, &ours));
            let ours = Message::from_octets(ours).expect("a message");
            let records = ours.answer().expect("records");
            assert!(records.into_iter().all(|record| record.is_ok()));
            assert!(by == Transport::Udp || !ours.header().tc());
        }
    }
});
