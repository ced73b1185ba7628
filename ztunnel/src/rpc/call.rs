//! One gRPC call: messages in frames, and the status at the end. Takes messages, gives messages; never holds more of
//! one than its limit, and never waits for the rest of one for ever.

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::client::ResponseFuture;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, StatusCode};
use prost::Message;

use super::connection::{Connection, within};
use super::error::{Code, Error, Status};

/// A call in which both sides send many messages.
pub struct Stream<R> {
    send: SendStream<Bytes>,
    receive: Receive,
    /// What came and is not a whole message yet.
    buffer: BytesMut,
    limit_bytes: usize,
    connection: Connection,
    _message: PhantomData<fn() -> R>,
}

enum Receive {
    Head(ResponseFuture),
    Body(RecvStream),
}

impl<R: Message + Default> Stream<R> {
    pub(super) fn new(
        send: SendStream<Bytes>,
        response: ResponseFuture,
        limit_bytes: usize,
        connection: Connection,
    ) -> Self {
        Self {
            send,
            receive: Receive::Head(response),
            buffer: BytesMut::new(),
            limit_bytes,
            connection,
            _message: PhantomData,
        }
    }

    /// The connection that it is on.
    #[must_use]
    pub const fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Sends a message. Not cancel safe: half a message may be on its way.
    ///
    /// # Errors
    /// The other side's reason to end the call, if it has told one; else what broke.
    pub async fn send(&mut self, message: &impl Message) -> Result<(), Error> {
        self.write(frame(message)?, false).await
    }

    pub(super) async fn send_last(&mut self, frame: Bytes) -> Result<(), Error> {
        self.write(frame, true).await
    }

    async fn write(&mut self, frame: Bytes, last: bool) -> Result<(), Error> {
        let written = within("write to the control plane", STALL, self.push(frame, last)).await;
        let Err(error) = written.and_then(|pushed| pushed) else {
            return Ok(());
        };
        // Who refuses a request does not read it to its end; the refusal says more than the broken pipe.
        match within("the refusal", REFUSAL, self.end()).await {
            Ok(refusal @ Error::Status(_)) => Err(refusal),
            _ => Err(error),
        }
    }

    /// How the call ended; what was said before is lost.
    async fn end(&mut self) -> Error {
        loop {
            match self.next().await {
                Ok(Some(_)) => {}
                Ok(None) => return Error::Protocol("the call is over"),
                Err(error) => return error,
            }
        }
    }

    async fn push(&mut self, mut frame: Bytes, last: bool) -> Result<(), Error> {
        while !frame.is_empty() {
            self.send.reserve_capacity(frame.len());
            let granted = std::future::poll_fn(|cx| self.send.poll_capacity(cx)).await;
            let granted = match granted {
                Some(granted) => granted.map_err(Error::Broken)?,
                None => return Err(Error::Protocol("the call is over")),
            };
            let chunk = frame.split_to(granted.min(frame.len()));
            let ends = last && frame.is_empty();
            self.send.send_data(chunk, ends).map_err(Error::Broken)?;
        }
        Ok(())
    }

    /// The next message; `None` when the call ended well. Cancel safe.
    ///
    /// # Errors
    /// How else the call ended.
    pub async fn next(&mut self) -> Result<Option<R>, Error> {
        loop {
            if let Some(message) = self.unframe()? {
                return Ok(Some(R::decode(message)?));
            }
            let more = if self.buffer.is_empty() {
                self.receive().await?
            } else {
                // A message that has begun must come to its end.
                within("the rest of a message", STALL, self.receive()).await??
            };
            match more {
                Some(data) => self.buffer.extend_from_slice(&data),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(Error::Protocol("half a message")),
            }
        }
    }

    /// The next bytes; `None` when the call ended well.
    async fn receive(&mut self) -> Result<Option<Bytes>, Error> {
        if let Receive::Head(response) = &mut self.receive {
            let response = response.await.map_err(Error::Broken)?;
            let (head, body) = response.into_parts();
            if head.status != StatusCode::OK {
                return Err(Error::Http(head.status.as_u16()));
            }
            // Without a body, the status stands in the head.
            if body.is_end_stream() {
                return status(&head.headers).map(|()| None);
            }
            self.receive = Receive::Body(body);
        }
        let Receive::Body(body) = &mut self.receive else {
            return Err(Error::Protocol("no body"));
        };
        match body.data().await {
            Some(Ok(data)) => {
                // Whoever takes too little of it would hold up the connection.
                body.flow_control()
                    .release_capacity(data.len())
                    .map_err(Error::Broken)?;
                Ok(Some(data))
            }
            Some(Err(error)) => Err(Error::Broken(error)),
            None => {
                let trailers = body.trailers().await.map_err(Error::Broken)?;
                let trailers = trailers.ok_or(Error::Protocol("the end has no status"))?;
                status(&trailers).map(|()| None)
            }
        }
    }

    /// A whole message, if there is one.
    fn unframe(&mut self) -> Result<Option<Bytes>, Error> {
        let mut head = &*self.buffer;
        if head.len() < FRAME_HEAD_BYTES {
            return Ok(None);
        }
        let compressed = head.get_u8();
        let bytes = usize::try_from(head.get_u32()).unwrap_or(usize::MAX);
        if compressed != 0 {
            return Err(Error::Protocol("a compressed message"));
        }
        if bytes > self.limit_bytes {
            let limit = self.limit_bytes;
            return Err(Error::TooLarge { bytes, limit });
        }
        if head.len() < bytes {
            return Ok(None);
        }
        self.buffer.advance(FRAME_HEAD_BYTES);
        Ok(Some(self.buffer.split_to(bytes).freeze()))
    }
}

impl<R> fmt::Debug for Stream<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream")
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}

/// A message as it goes over the wire.
pub(super) fn frame(message: &impl Message) -> Result<Bytes, Error> {
    let bytes = message.encoded_len();
    let Ok(length) = u32::try_from(bytes) else {
        let limit = usize::try_from(u32::MAX).unwrap_or(usize::MAX);
        return Err(Error::TooLarge { bytes, limit });
    };
    let mut frame = BytesMut::with_capacity(FRAME_HEAD_BYTES + bytes);
    frame.put_u8(0);
    frame.put_u32(length);
    let encoded = message.encode(&mut frame);
    encoded.map_err(|_full| Error::Protocol("a message longer than it says"))?;
    Ok(frame.freeze())
}

fn status(headers: &HeaderMap) -> Result<(), Error> {
    let code = headers
        .get("grpc-status")
        .and_then(|code| code.to_str().ok()?.parse().ok())
        .ok_or(Error::Protocol("the end has no status"))?;
    if code == 0 {
        return Ok(());
    }
    let message = headers
        .get("grpc-message")
        .map(|text| unescape(text.as_bytes()));
    Err(Error::Status(Status {
        code: Code(code),
        message: message.unwrap_or_default(),
    }))
}

/// The text behind `%xx`; what is no escape stays as it is.
fn unescape(text: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let escaped = match tail {
            [high, low, ..] if *first == b'%' => digit(*high).zip(digit(*low)),
            _ => None,
        };
        match escaped {
            Some((high, low)) => {
                bytes.push((high << 4) | low);
                rest = tail.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

const fn digit(hex: u8) -> Option<u8> {
    match hex {
        b'0'..=b'9' => Some(hex - b'0'),
        b'a'..=b'f' => Some(hex - b'a' + 10),
        b'A'..=b'F' => Some(hex - b'A' + 10),
        _ => None,
    }
}

const FRAME_HEAD_BYTES: usize = 5;
/// How long the rest of a message, or room to write, may take.
const STALL: Duration = Duration::from_secs(10);
/// How long a refusal may take when writing failed.
const REFUSAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_with_its_escapes() {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-status", "16".parse().unwrap());
        headers.insert("grpc-message", "no%20token%2C %zz".parse().unwrap());
        let Err(Error::Status(status)) = status(&headers) else {
            panic!("a status");
        };
        assert_eq!(status.code, Code::UNAUTHENTICATED);
        assert_eq!(status.message, "no token, %zz");
        assert!(status.to_string().contains("UNAUTHENTICATED"), "{status}");
    }

    #[test]
    fn an_end_without_a_status_is_no_success() {
        assert!(matches!(status(&HeaderMap::new()), Err(Error::Protocol(_))));
        let mut headers = HeaderMap::new();
        headers.insert("grpc-status", "ok".parse().unwrap());
        assert!(matches!(status(&headers), Err(Error::Protocol(_))));
    }
}
