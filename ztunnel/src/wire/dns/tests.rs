//! Messages as resolver libraries send and read them.

use domain::base::iana::OptRcode;
use domain::rdata::AllRecordData;

use super::*;

/// A question for `name`, with an OPT record of this size if there is one.
fn ask(name: &str, rtype: Rtype, opt: Option<u16>) -> Vec<u8> {
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(0x1234);
    builder.header_mut().set_rd(true);
    let mut builder = builder.question();
    let name: Name<Vec<u8>> = name.parse().unwrap();
    builder.push((name, rtype)).unwrap();
    let mut builder = builder.additional();
    if let Some(size) = opt {
        builder
            .opt(|opt| {
                opt.set_udp_payload_size(size);
                opt.set_dnssec_ok(true);
                Ok(())
            })
            .unwrap();
    }
    builder.finish()
}

fn known(addresses: usize) -> Known {
    let byte = |n: usize| u8::try_from(n % 256).unwrap();
    let address = |n: usize| IpAddr::from([10, 0, byte(n / 256), byte(n)]);
    Known {
        canonical: None,
        addresses: (0..addresses).map(address).collect(),
    }
}

fn records(message: &Message<Vec<u8>>) -> Vec<String> {
    let answer = message.answer().unwrap();
    answer
        .limit_to::<AllRecordData<_, _>>()
        .map(|record| {
            let record = record.unwrap();
            let (owner, ttl) = (record.owner(), record.ttl().as_secs());
            format!("{owner} {ttl} {}", record.data())
        })
        .collect()
}

#[test]
fn only_questions_for_addresses_are_ours() {
    for (name, rtype, read_as) in [
        (
            "A.Ns1.Svc.Cluster.Local",
            Rtype::A,
            "a.ns1.svc.cluster.local",
        ),
        ("_x._tcp.b", Rtype::AAAA, "_x._tcp.b"),
        (".", Rtype::A, ""),
    ] {
        let Ok(Read::Addresses(question)) = read(&ask(name, rtype, None)) else {
            panic!("{name}");
        };
        assert_eq!(question.name, read_as);
        assert_eq!(question.family == Family::V4, rtype == Rtype::A);
    }
    // 130.
    for (rtype, label) in [
        (Rtype::MX, "MX"),
        (Rtype::TXT, "TXT"),
        (Rtype::SRV, "SRV"),
        (Rtype::NS, "NS"),
        (Rtype::PTR, "PTR"),
        (Rtype::from_int(60_000), "other"),
    ] {
        assert_eq!(read(&ask("a", rtype, None)), Ok(Read::Other(label)));
    }
    // No host in the mesh has such a name.
    assert_eq!(read(&ask("a\\.b.c", Rtype::A, None)), Ok(Read::Other("A")));
    assert_eq!(read(&ask("\\195.c", Rtype::A, None)), Ok(Read::Other("A")));
    // 139: another resolver knows what to say to another opcode.
    let mut update = ask("a", Rtype::A, None);
    update[2] = 5 << 3;
    assert_eq!(read(&update), Ok(Read::Other("other")));
    let mut later = ask("a", Rtype::A, Some(1232));
    let version = later.len() - 5;
    later[version] = 1;
    assert_eq!(read(&later), Ok(Read::Other("A")), "a later EDNS");
}

#[test]
fn what_is_no_question_is_refused_by_name() {
    assert_eq!(read(&[0; 11]), Err(Malformed::Header));
    let mut answer = ask("a", Rtype::A, None);
    answer[2] |= 0x80;
    assert_eq!(read(&answer), Err(Malformed::Answer));
    let whole = ask("a.b", Rtype::A, None);
    for length in 12..whole.len() {
        assert_eq!(read(&whole[..length]), Err(Malformed::Question), "{length}");
    }
    let mut two = whole.clone();
    two[5] = 2;
    assert_eq!(read(&two), Err(Malformed::Question));
    let mut looping = whole;
    looping[12..14].copy_from_slice(&[0xc0, 12]);
    assert_eq!(read(&looping), Err(Malformed::Question), "a name in itself");

    assert_eq!(failure(&answer, Failed::Format), None, "nobody asked");
    let refused = failure(&two, Failed::Format).unwrap();
    let refused = Message::from_octets(refused).unwrap();
    assert_eq!(refused.header().rcode(), Rcode::FORMERR);
    assert_eq!(refused.header().id(), 0x1234);
    assert_eq!(failure(&[0; 11], Failed::Format), None);
}

#[test]
fn an_answer_is_authoritative_and_in_the_name_that_was_asked_for() {
    let question = ask("A.ns1", Rtype::A, None);
    let answer = answer(&question, &known(2), Transport::Udp).unwrap();
    let answer = Message::from_octets(answer).unwrap();
    let header = answer.header();
    assert!(header.qr() && header.aa() && header.ra() && header.rd() && !header.tc());
    assert_eq!((header.id(), header.rcode()), (0x1234, Rcode::NOERROR));
    assert_eq!(records(&answer), ["A.ns1 30 10.0.0.0", "A.ns1 30 10.0.0.1"]);
    assert!(answer.opt().is_none());
    assert!(answers(&question, answer.as_slice()));
    assert!(!answers(&ask("b", Rtype::A, None)[1..], answer.as_slice()));
}

#[test]
fn an_answer_has_the_number_the_kind_and_the_question_that_were_sent() {
    let asked = ask("a.b", Rtype::A, None);
    let good = answer(&asked, &known(1), Transport::Udp).unwrap();
    assert!(answers(&asked, &good));
    assert!(
        answers(&ask("A.B", Rtype::A, Some(1232)), &good),
        "whatever its case"
    );
    let changed = |at: usize, to: u8| {
        let mut bytes = good.clone();
        bytes[at] = to;
        bytes
    };
    assert!(!answers(&asked, &changed(1, 0x35)), "another number");
    assert!(!answers(&asked, &changed(2, 0)), "a question");
    assert!(!answers(&asked, &changed(2, 0x80 | 4 << 3)), "a notice");
    assert!(!answers(&asked, &changed(13, b'x')), "another name");
    assert!(!answers(&asked, &changed(18, 28)), "another type");
    let mut short = failure(&asked, Failed::Server).unwrap();
    short.truncate(12);
    short[5] = 0;
    assert!(answers(&asked, &short), "a refusal without the question");
    short[3] &= 0xf0;
    assert!(!answers(&asked, &short), "an answer without it");
    // What is no question cannot be compared with one.
    let mut update = asked;
    update[2] = 5 << 3;
    let mut updated = good;
    updated[2] = 0x80 | 5 << 3;
    assert!(answers(&update, &updated));
    assert!(answers(&update, &updated[..12]));
}

#[test]
fn another_name_is_shown_by_a_cname() {
    let known = Known {
        canonical: Some("www.x.com".into()),
        addresses: vec!["fd00::1".parse().unwrap()],
    };
    let question = ask("www.x.com.ns1.svc.cluster.local", Rtype::AAAA, None);
    let answer = answer(&question, &known, Transport::Udp).unwrap();
    assert_eq!(
        records(&Message::from_octets(answer).unwrap()),
        [
            "www.x.com.ns1.svc.cluster.local 30 www.x.com.",
            "www.x.com 30 fd00::1"
        ]
    );
}

#[test]
fn a_known_name_without_addresses_is_no_error() {
    let answer = answer(&ask("a", Rtype::AAAA, None), &known(0), Transport::Udp).unwrap();
    let answer = Message::from_octets(answer).unwrap();
    assert_eq!(answer.header().rcode(), Rcode::NOERROR);
    assert!(answer.header().aa());
    assert_eq!(answer.header_counts().ancount(), 0);
}

// 137.
#[test]
fn a_datagram_is_cut_to_what_the_asker_takes_and_a_connection_is_not() {
    for (opt, limit) in [
        (None, 512),
        (Some(100), 512),
        (Some(1232), 1232),
        (Some(65_535), 4096),
    ] {
        let question = ask("a.ns1.svc.cluster.local", Rtype::A, opt);
        let cut = answer(&question, &known(256), Transport::Udp).unwrap();
        assert!(cut.len() <= limit, "{} for {opt:?}", cut.len());
        assert!(cut.len() + 16 > limit, "as much as fits");
        let cut = Message::from_octets(cut).unwrap();
        assert!(cut.header().tc());
        let echoed = cut
            .opt()
            .map(|opt| (opt.udp_payload_size(), opt.dnssec_ok()));
        assert_eq!(echoed, opt.map(|size| (size.max(512), true)));
        if let Some(echoed) = cut.opt() {
            assert_eq!(echoed.rcode(cut.header()), OptRcode::NOERROR);
        }
        let whole = answer(&question, &known(256), Transport::Tcp).unwrap();
        let whole = Message::from_octets(whole).unwrap();
        assert!(!whole.header().tc());
        assert_eq!(records(&whole).len(), 256);
    }
}
