//! gRPC as a server that need not behave: frames, status, GOAWAY, cuts. Takes a TLS listener, gives calls with their
//! raw bytes; never decides what to answer.

use std::{future::poll_fn, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::{RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Response, request::Parts};
use prost::Message;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::broadcast,
};
use tokio_rustls::TlsAcceptor;

/// What happens to connections, whatever is on them.
#[derive(Clone, Debug)]
pub(crate) enum Fate {
    /// A GOAWAY as a control plane sends it before it leaves; calls go on for this long, then the connection is cut
    /// without a word.
    Leave(Duration),
    /// Closed at once, without a word.
    Cut,
}

/// A call: its head, what the client sends, and the way to answer.
pub(crate) struct Call {
    pub(crate) head: Parts,
    pub(crate) body: RecvStream,
    pub(crate) respond: SendResponse<Bytes>,
    buffer: BytesMut,
}

impl Call {
    /// The next message's bytes; `None` when the client ends.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if let Some(mut length) = self.buffer.get(1..5) {
                let length = usize::try_from(length.get_u32())?;
                if self.buffer.len() >= 5 + length {
                    self.buffer.advance(5);
                    return Ok(Some(self.buffer.split_to(length).freeze()));
                }
            }
            match self.body.data().await {
                Some(data) => {
                    let data = data?;
                    self.body.flow_control().release_capacity(data.len())?;
                    self.buffer.extend_from_slice(&data);
                }
                None => return Ok(None),
            }
        }
    }

    /// Opens the answer.
    pub(crate) fn begin(&mut self) -> Result<Answer> {
        let head = Response::builder().header("content-type", "application/grpc");
        Ok(Answer(self.respond.send_response(head.body(())?, false)?))
    }

    /// Refuses in the head, as servers do before they have answered anything.
    pub(crate) fn refuse(&mut self, code: u16, message: &str) -> Result<()> {
        let mut response = Response::builder()
            .header("content-type", "application/grpc")
            .body(())?;
        response.headers_mut().extend(status(code, message)?);
        self.respond.send_response(response, true)?;
        Ok(())
    }
}

/// An answer that has begun.
pub(crate) struct Answer(SendStream<Bytes>);

impl Answer {
    pub(crate) async fn send(&mut self, message: &impl Message) -> Result<()> {
        let mut frame = BytesMut::new();
        frame.put_u8(0);
        frame.put_u32(u32::try_from(message.encoded_len())?);
        message.encode(&mut frame)?;
        self.raw(frame.freeze()).await
    }

    /// Any bytes at all.
    pub(crate) async fn raw(&mut self, mut bytes: Bytes) -> Result<()> {
        while !bytes.is_empty() {
            self.0.reserve_capacity(bytes.len());
            let granted = poll_fn(|cx| self.0.poll_capacity(cx)).await;
            let granted = granted.context("the client is gone")??;
            let chunk = bytes.split_to(granted.min(bytes.len()));
            self.0.send_data(chunk, false)?;
        }
        Ok(())
    }

    pub(crate) fn end(&mut self, code: u16, message: &str) -> Result<()> {
        Ok(self.0.send_trailers(status(code, message)?)?)
    }
}

fn status(code: u16, message: &str) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    headers.insert("grpc-status", HeaderValue::from(code));
    headers.insert("grpc-message", HeaderValue::from_str(message)?);
    Ok(headers)
}

/// Accepts until it is dropped; each call is given to `serve`.
pub(crate) async fn accept<F>(
    listener: TcpListener,
    tls: TlsAcceptor,
    fate: broadcast::Sender<Fate>,
    serve: impl Fn(Call) -> F + Send + Sync + 'static,
) where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let serve = Arc::new(serve);
    while let Ok((tcp, _)) = listener.accept().await {
        let (tls, fate, serve) = (tls.clone(), fate.subscribe(), Arc::clone(&serve));
        tokio::spawn(async move {
            // A client that goes away, or is cut off, is part of the play.
            drop(Box::pin(converse(tcp, tls, fate, serve)).await);
        });
    }
}

async fn converse<F>(
    tcp: TcpStream,
    tls: TlsAcceptor,
    mut fate: broadcast::Receiver<Fate>,
    serve: Arc<impl Fn(Call) -> F + Send + Sync>,
) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let tls = tls.accept(tcp).await?;
    let mut connection = h2::server::Builder::new()
        .initial_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .handshake(tls)
        .await?;
    let mut cut_at = None;
    loop {
        tokio::select! {
            call = connection.accept() => match call {
                Some(Ok((request, respond))) => {
                    let (head, body) = request.into_parts();
                    let call = Call { head, body, respond, buffer: BytesMut::new() };
                    let work = serve(call);
                    tokio::spawn(async move { drop(work.await) });
                }
                Some(Err(error)) => bail!(error),
                None => return Ok(()),
            },
            order = fate.recv() => match order? {
                Fate::Cut => return Ok(()),
                Fate::Leave(after) => {
                    connection.graceful_shutdown();
                    cut_at = Some(tokio::time::Instant::now() + after);
                }
            },
            () = until(cut_at) => return Ok(()),
        }
    }
}

async fn until(instant: Option<tokio::time::Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
