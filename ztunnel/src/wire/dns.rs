//! DNS messages. Takes the bytes of a question, gives what it asks, and the bytes of our answers to
//! it; pure, and never trusts a length or a count in a message.

use std::net::IpAddr;

use domain::base::iana::{Class, Opcode, Rcode};
use domain::base::message_builder::{AnswerBuilder, PushError};
use domain::base::name::{Name, ToLabelIter as _};
use domain::base::wire::Composer;
use domain::base::{Message, MessageBuilder, Rtype, StaticCompressor, Ttl};
use domain::rdata::{A, Aaaa, Cname};
use thiserror::Error;

/// The family of addresses that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What is known of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// The name that the addresses belong to, where it is another than the one asked for.
    pub canonical: Option<String>,
    /// The addresses of the family that was asked for, in any order; maybe none.
    pub addresses: Vec<IpAddr>,
}

/// How a question came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    /// In a datagram.
    Udp,
    /// In a connection.
    Tcp,
}

/// A question that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// It asks for the addresses of a name.
    Addresses(Question),
    /// Whatever else, of this type; only another resolver can know.
    Other(&'static str),
}

/// A question for the addresses of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// In lower case, without a dot at its end.
    pub name: String,
    /// Which addresses.
    pub family: Family,
}

/// It is no question of DNS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Malformed {
    /// Not even the beginning of a message: it cannot be answered.
    #[error("a message that is shorter than its header")]
    Header,
    /// It is an answer.
    #[error("an answer where a question should be")]
    Answer,
    /// Its question cannot be read, or is not one.
    #[error("a message without a question that can be read")]
    Question,
}

/// What our own answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failed {
    /// The message is none that can be answered.
    Format,
    /// Nobody could be asked, or nobody answered.
    Server,
}

impl Question {
    /// The label of its type.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self.family {
            Family::V4 => "A",
            Family::V6 => "AAAA",
        }
    }
}

impl Read {
    /// The label of the type that it asks for.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Addresses(question) => question.label(),
            Self::Other(label) => label,
        }
    }
}

/// Reads a message.
///
/// # Errors
/// When it is not a question.
pub fn read(bytes: &[u8]) -> Result<Read, Malformed> {
    let Ok(message) = Message::from_slice(bytes) else {
        return Err(Malformed::Header);
    };
    if message.header().qr() {
        return Err(Malformed::Answer);
    }
    if message.header().opcode() != Opcode::QUERY {
        return Ok(Read::Other(OTHER));
    }
    let Ok(question) = message.sole_question() else {
        return Err(Malformed::Question);
    };
    let family = match question.qtype() {
        Rtype::A => Family::V4,
        Rtype::AAAA => Family::V6,
        other => return Ok(Read::Other(label(other))),
    };
    let other = match family {
        Family::V4 => Read::Other("A"),
        Family::V6 => Read::Other("AAAA"),
    };
    // What a later version of the protocol means by a question, we cannot know.
    if question.qclass() != Class::IN || message.opt().is_some_and(|opt| opt.version() != 0) {
        return Ok(other);
    }
    let mut name = String::new();
    for label in question.qname().iter_labels() {
        let Some(text) = host_label(label.as_slice()) else {
            return Ok(other);
        };
        if !name.is_empty() && !text.is_empty() {
            name.push('.');
        }
        name.push_str(&text.to_ascii_lowercase());
    }
    Ok(Read::Addresses(Question { name, family }))
}

/// Our answer, no longer than it may be.
#[must_use]
pub fn answer(bytes: &[u8], known: &Known, by: Transport) -> Option<Vec<u8>> {
    let message = Message::from_slice(bytes).ok()?;
    let opt = message.opt();
    let limit = match (by, &opt) {
        (Transport::Tcp, _) => usize::from(u16::MAX),
        (Transport::Udp, None) => PLAIN_BYTES,
        (Transport::Udp, Some(opt)) => {
            usize::from(opt.udp_payload_size()).clamp(PLAIN_BYTES, EDNS_BYTES)
        }
    };
    let question = message.sole_question().ok()?;
    let target = StaticCompressor::new(Vec::with_capacity(PLAIN_BYTES));
    let mut builder = MessageBuilder::from_target(target).ok()?;
    builder.set_push_limit(limit - opt.as_ref().map_or(0, |_| OPT_BYTES));
    let mut builder = builder.start_answer(message, Rcode::NOERROR).ok()?;
    builder.header_mut().set_aa(true);
    let pushed = match &known.canonical {
        None => push_all(&mut builder, question.qname(), &known.addresses),
        Some(canonical) => {
            let owner: Name<Vec<u8>> = canonical.parse().ok()?;
            let alias = (question.qname(), Class::IN, TTL, Cname::new(&owner));
            builder
                .push(alias)
                .and_then(|()| push_all(&mut builder, &owner, &known.addresses))
        }
    };
    if pushed.is_err() {
        builder.header_mut().set_tc(true);
    }
    finish(builder, message)
}

/// Our answer when there is none. None: it cannot even be said, or nobody asked. Who answers an answer
/// may be answered for ever.
#[must_use]
pub fn failure(bytes: &[u8], failed: Failed) -> Option<Vec<u8>> {
    let message = Message::from_slice(bytes).ok()?;
    if message.header().qr() {
        return None;
    }
    let rcode = match failed {
        Failed::Format => Rcode::FORMERR,
        Failed::Server => Rcode::SERVFAIL,
    };
    let target = StaticCompressor::new(Vec::with_capacity(PLAIN_BYTES));
    let mut builder = MessageBuilder::from_target(target).ok()?;
    builder.set_push_limit(PLAIN_BYTES - OPT_BYTES);
    finish(builder.start_error(message, rcode), message)
}

/// Whether `answer` is one to the message in `bytes`: of its number and kind, and, if that is a
/// question, to this one. A refusal may leave the question out.
#[must_use]
pub fn answers(bytes: &[u8], answer: &[u8]) -> bool {
    let (Ok(asked), Ok(answer)) = (Message::from_slice(bytes), Message::from_slice(answer)) else {
        return false;
    };
    let (header, wanted) = (answer.header(), asked.header());
    if !header.qr() || header.id() != wanted.id() || header.opcode() != wanted.opcode() {
        return false;
    }
    match (asked.sole_question(), answer.sole_question()) {
        (Err(_), _) => true,
        (Ok(_), _) if header.opcode() != Opcode::QUERY => true,
        (Ok(asked), Ok(answered)) => asked == answered,
        (Ok(_), Err(_)) => {
            answer.header_counts().qdcount() == 0 && header.rcode() != Rcode::NOERROR
        }
    }
}

/// Whether an answer says that its resolver cannot or will not know.
#[must_use]
pub fn is_refusal(answer: &[u8]) -> bool {
    let header = Message::from_slice(answer).map(|answer| answer.header());
    header.is_ok_and(|header| matches!(header.rcode(), Rcode::SERVFAIL | Rcode::REFUSED))
}

fn push_all<T: Composer>(
    builder: &mut AnswerBuilder<T>,
    owner: impl domain::base::ToName + Copy,
    addresses: &[IpAddr],
) -> Result<(), PushError> {
    addresses.iter().try_for_each(|address| match address {
        IpAddr::V4(v4) => builder.push((owner, Class::IN, TTL, A::new(*v4))),
        IpAddr::V6(v6) => builder.push((owner, Class::IN, TTL, Aaaa::new(*v6))),
    })
}

/// With the OPT record of an asker who sent one.
fn finish(
    mut builder: AnswerBuilder<StaticCompressor<Vec<u8>>>,
    asked: &Message<[u8]>,
) -> Option<Vec<u8>> {
    builder.header_mut().set_ra(true);
    let mut builder = builder.additional();
    if let Some(opt) = asked.opt() {
        builder.clear_push_limit();
        let written = builder.opt(|ours| {
            ours.set_udp_payload_size(opt.udp_payload_size().max(512));
            ours.set_dnssec_ok(opt.dnssec_ok());
            Ok(())
        });
        written.ok()?;
    }
    Some(builder.finish().into_target())
}

/// A part of a host name as text; none when no host in the mesh can have it.
fn host_label(label: &[u8]) -> Option<&str> {
    let fits = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_*".contains(byte);
    label
        .iter()
        .all(fits)
        .then(|| std::str::from_utf8(label).ok())?
}

/// The types that are told apart; an asker chooses among 65,536.
fn label(rtype: Rtype) -> &'static str {
    match rtype {
        Rtype::ANY => "ANY",
        Rtype::CNAME => "CNAME",
        Rtype::HTTPS => "HTTPS",
        Rtype::MX => "MX",
        Rtype::NS => "NS",
        Rtype::PTR => "PTR",
        Rtype::SOA => "SOA",
        Rtype::SRV => "SRV",
        Rtype::SVCB => "SVCB",
        Rtype::TXT => "TXT",
        _ => OTHER,
    }
}

const OTHER: &str = "other";
/// Of everything that we answer ourselves.
// PROTOCOL.md#dns-answer
const TTL: Ttl = Ttl::from_secs(30);
/// A datagram for an asker who said nothing of its size (RFC 1035 4.2.1).
const PLAIN_BYTES: usize = 512;
/// The largest datagram that we make for one who did.
const EDNS_BYTES: usize = 4096;
/// An OPT record without options (RFC 6891 6.1.2).
const OPT_BYTES: usize = 11;

#[cfg(test)]
mod tests;
