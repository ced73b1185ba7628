//! What a session reads of TLS after its handshake. Takes any bytes as the wire and as what lies
//! inside records, checks that every answer is within bounds; never decrypts.

#[path = "../../../ztunnel/src/tunnel/tls/frame.rs"]
#[expect(dead_code, reason = "what is sent is not read")]
mod frame;

/// Reads records, alerts and messages.
pub fn read(data: &[u8]) {
    let mut wire = data;
    while let Ok(Some(len)) = frame::record(wire) {
        assert!((5..=5 + (1 << 14) + 2048).contains(&len));
        let Some((record, rest)) = wire.split_at_checked(len) else {
            break;
        };
        let inside = record.get(frame::HEADER_BYTES..).expect("a header");
        assert_eq!(frame::alert(inside).is_ok(), inside.len() == 2);
        wire = rest;
    }
    // However the messages are cut, the same ones are found.
    let mut whole = data.to_vec();
    let mut found = Vec::new();
    let end = loop {
        match frame::message(&mut whole) {
            Ok(Some(message)) => found.push(message),
            Ok(None) => break None,
            Err(violation) => break Some(violation),
        }
    };
    let (mut held, mut again) = (Vec::new(), Vec::new());
    let mut ended = None;
    for byte in data {
        held.push(*byte);
        match frame::message(&mut held) {
            Ok(message) => again.extend(message),
            Err(violation) => {
                ended = Some(violation);
                break;
            }
        }
    }
    assert_eq!((found, end), (again, ended));
}
