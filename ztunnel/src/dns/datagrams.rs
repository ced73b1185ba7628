//! Answering a pod over UDP. Takes questions that came in datagrams, gives each an answer: ours, or
//! what the resolver that was meant said. Never passes on more questions at a time than its bound,
//! and never takes for an answer what is none to the question.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::task::{spawn_local, yield_now};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, warn};

use super::PORT;
use super::counts::Refused;
use super::pod::{Judged, Place, Pod};
use crate::capture::{Asker, Questions};
use crate::wire::dns::{self as message, Failed, Transport};

/// Answers the pod's datagrams until its context is forced to end: whoever asks in vain is told so at
/// once, and asks nobody else.
pub async fn serve(pod: Rc<Pod>, questions: Questions) {
    let questions = Rc::new(questions);
    let mut drain = pod.cx.drain.clone();
    loop {
        let readable = tokio::select! {
            readable = questions.readable() => readable,
            _ = drain.forced() => return,
        };
        match readable.and_then(|()| take_some(&pod, &questions)) {
            Ok(()) => yield_now().await,
            Err(error) => {
                warn!(pod = %pod.cx.pod, %error, "cannot read the pod's questions; trying again");
                sleep(PAUSE).await;
            }
        }
    }
}

/// Reads what is there, some at a time, and sets about answering it.
fn take_some(pod: &Rc<Pod>, questions: &Rc<Questions>) -> io::Result<()> {
    for _ in 0..AT_ONCE {
        let mut buffer = pod.server.buffer.borrow_mut();
        let Some((length, asker)) = questions.take(&mut buffer)? else {
            break;
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        match pod.enter_question(length) {
            Some(places) => {
                let waiting = Waiting {
                    pod: Rc::clone(pod),
                    questions: Rc::clone(questions),
                    bytes: bytes.into(),
                    asker,
                    _places: places,
                };
                spawn_local(waiting.serve());
            }
            None => {
                pod.refused(Refused::Questions);
                if let Some(refusal) = message::failure(bytes, Failed::Server)
                    && let Err(error) = questions.answer_at_once(&asker, &refusal)
                {
                    debug!(target: "dns", pod = %pod.cx.pod, %error, "not even refused");
                }
            }
        }
    }
    Ok(())
}

/// A question that waits for its answer.
struct Waiting {
    pod: Rc<Pod>,
    questions: Rc<Questions>,
    bytes: Box<[u8]>,
    asker: Asker,
    _places: [Place; 2],
}

impl Waiting {
    async fn serve(self) {
        let mut forced = self.pod.cx.drain.clone();
        tokio::select! {
            () = self.answer() => {}
            _ = forced.forced() => {}
        }
    }

    async fn answer(&self) {
        let pod = &self.pod;
        let answer = match pod.judge(&self.bytes, Transport::Udp).await {
            Judged::Answer(answer) => answer,
            Judged::Forward { asked, client } => {
                let began = Instant::now();
                let answer = self.forward().await;
                let outcome = (answer.is_ok(), began.elapsed());
                pod.forwarded((&asked, &client), Transport::Udp, outcome);
                match answer {
                    Ok(answer) => Some(answer),
                    Err(error) => {
                        debug!(target: "dns", pod = %pod.cx.pod, %error, "no answer");
                        message::failure(&self.bytes, Failed::Server)
                    }
                }
            }
        };
        if let Some(answer) = answer
            && let Err(error) = self.questions.answer(&self.asker, &answer).await
        {
            debug!(target: "dns", pod = %pod.cx.pod, %error, "the answer was not sent");
        }
    }

    /// What the resolver says, as it says it: the first of several that says anything.
    // PROTOCOL.md#dns-forward
    async fn forward(&self) -> io::Result<Vec<u8>> {
        let resolvers = self.questions.resolvers(&self.asker);
        let several = u32::try_from(resolvers.len()).unwrap_or(u32::MAX).max(1);
        let mut answer = Err(io::ErrorKind::AddrNotAvailable.into());
        for resolver in resolvers {
            let asked = timeout(PATIENCE / several, self.ask(resolver)).await;
            let said = asked.unwrap_or_else(|late| Err(late.into()));
            if let Ok(said) = &said
                && !message::is_refusal(said)
            {
                self.questions.has_answered(resolver);
                answer = Ok(said.clone());
                break;
            }
            // The first word stays if nobody has a better one.
            answer = answer.or(said);
        }
        answer
    }

    /// From a socket of its own, so that whoever wants to answer in the resolver's name has to know
    /// its port, too.
    async fn ask(&self, resolver: IpAddr) -> io::Result<Vec<u8>> {
        let resolver = SocketAddr::new(resolver, PORT);
        let socket = self.pod.cx.dial.question(resolver).await?;
        socket.send(&self.bytes).await?;
        let mut wrong = 0;
        while wrong < MAX_WRONG {
            // PROTOCOL.md#dns-icmp
            // A refusal of the resolver's host wakes nobody who waits for data alone.
            let ready = Interest::READABLE | Interest::ERROR;
            if socket.ready(ready).await?.is_error() {
                refused(&socket)?;
            }
            let mut buffer = self.pod.server.buffer.borrow_mut();
            match socket.try_recv(&mut buffer) {
                Ok(length) => {
                    let answer = buffer.get(..length).unwrap_or_default();
                    if message::answers(&self.bytes, answer) {
                        return Ok(answer.into());
                    }
                    wrong += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}

/// The error of a socket that has one. One that was told of and has none waits for the next.
fn refused(socket: &UdpSocket) -> io::Result<()> {
    let none = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
    match socket.take_error()? {
        Some(refused) => Err(refused),
        None => socket.try_io(Interest::ERROR, none).or(Ok(())),
    }
}

/// Datagrams that are read before others have their turn.
const AT_ONCE: usize = 16;
/// Datagrams that are no answer to the question: who sends more means no good, and holds a worker.
const MAX_WRONG: u32 = 16;
/// For the answers of all resolvers; whoever asked asks again, or another one, at about that time.
const PATIENCE: Duration = Duration::from_secs(5);
/// Before a socket is read again that could not be.
const PAUSE: Duration = Duration::from_millis(50);
