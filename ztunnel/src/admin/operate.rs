//! The operator's port: the state, the log's level, the end. Takes requests that come from this host
//! by its own name, gives answers; never answers on an address of a pod or for a page of somebody
//! else's.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, ORIGIN};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri, request};
use http_body_util::Full;
use tokio::sync::{Semaphore, mpsc};

use super::dump::Sources;
use super::{Answer, Handler, method_not_allowed, text};
use crate::logging::{Base, Levels};

/// Answers operators. Clones share everything.
#[derive(Clone, Debug)]
pub struct Operate {
    /// What the dump is made of.
    pub sources: Sources,
    /// The log's filter.
    pub levels: Levels,
    /// Ends the process.
    pub quit: mpsc::Sender<()>,
    /// Who may make a dump: it takes memory, and a thread until it is done.
    pub turn: Arc<Semaphore>,
}

// PROTOCOL.md#admin
impl Handler for Operate {
    async fn answer(&self, request: &request::Parts) -> Answer {
        if !names_this_host(&request.headers) || !comes_from_this_host(&request.headers) {
            let why = "this port answers requests for localhost only\n";
            return text(StatusCode::FORBIDDEN, why.to_owned());
        }
        let query = request.uri.query().unwrap_or_default();
        match (request.uri.path(), &request.method) {
            ("/", _) => html(INDEX),
            ("/config_dump", _) => self.dump().await,
            ("/logging", &Method::POST) => self.logging(query),
            ("/logging", _) => usage(LOGGING_USAGE),
            ("/quitquitquit", &Method::POST) => {
                if self.quit.try_send(()).is_err() {
                    tracing::debug!("the end was asked for before");
                }
                text(StatusCode::OK, "shutdown now\n".to_owned())
            }
            ("/quitquitquit", _) => method_not_allowed("POST"),
            ("/debug/pprof/profile", _) => profile(query),
            ("/debug/pprof/heap", _) => {
                let why = "this build keeps no heap profile: its allocator is built without one\n";
                text(StatusCode::INTERNAL_SERVER_ERROR, why.to_owned())
            }
            ("/debug/pprof/heap/profiling", _) => heap_profiling(query),
            _ => text(StatusCode::NOT_FOUND, String::new()),
        }
    }
}

impl Operate {
    async fn dump(&self) -> Answer {
        let sources = self.sources.clone();
        // Who goes away meanwhile leaves the dump to its end, and the turn with it.
        let turn = Arc::clone(&self.turn).acquire_owned().await;
        // A large mesh takes a while, and scrapes and probes share this thread.
        let dump = tokio::task::spawn_blocking(move || {
            let dump = sources.dump();
            drop(turn);
            dump
        });
        let dump = dump.await;
        match dump {
            Ok(Ok(json)) => {
                let mut answer = Response::new(Full::from(json));
                let json = HeaderValue::from_static("application/json");
                answer.headers_mut().insert(CONTENT_TYPE, json);
                answer
            }
            Ok(Err(error)) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }

    // PROTOCOL.md#log-level
    fn logging(&self, query: &str) -> Answer {
        let mut base = Base::Now;
        let mut directives = None;
        for (key, value) in pairs(query) {
            match &*key {
                "level" => directives = Some(value),
                "reset" => base = Base::Start,
                _ => return bad(format!("{key:?} is neither level nor reset\n")),
            }
        }
        if directives.is_some() || base == Base::Start {
            let directives = directives.unwrap_or_default();
            if let Err(error) = self.levels.change(base, &directives) {
                return bad(format!("{}\n", chain(&error)));
            }
            tracing::info!(filter = self.levels.show(), "log level changed");
        }
        let now = format!("current log level is {}\n", self.levels.show());
        text(StatusCode::OK, now)
    }
}

/// Whether the request was made for this host by a name of its own: a page in an operator's browser
/// that resolves its own name to this host has another one in it.
fn names_this_host(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(HOST) else {
        return true; // HTTP/1.0; no browser
    };
    let authority = host.to_str().unwrap_or_default().parse();
    authority.is_ok_and(|authority: http::uri::Authority| is_this_host(authority.host()))
}

/// Whether no page of another host asks: a browser tells where the page is from that sends a POST.
fn comes_from_this_host(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(ORIGIN) else {
        return true;
    };
    let origin = origin.to_str().unwrap_or_default().parse();
    origin.is_ok_and(|origin: Uri| origin.host().is_some_and(is_this_host))
}

fn is_this_host(name: &str) -> bool {
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let address = name.parse::<std::net::IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

fn profile(query: &str) -> Answer {
    for (key, value) in pairs(query) {
        let range = match &*key {
            "seconds" => 1..=300,
            "frequency" => 1..=1000,
            _ => continue,
        };
        if !value
            .parse::<u32>()
            .is_ok_and(|value| range.contains(&value))
        {
            let (low, high) = range.into_inner();
            return bad(format!("{key} must be a number from {low} to {high}\n"));
        }
    }
    let why = "this build has no profiler of its own: perf record -g -p <pid> shows the same\n";
    text(StatusCode::NOT_IMPLEMENTED, why.to_owned())
}

fn heap_profiling(query: &str) -> Answer {
    for (key, value) in pairs(query) {
        match (&*key, &*value) {
            ("activate", "true") => {
                let why = "this build cannot keep a heap profile\n";
                return text(StatusCode::NOT_IMPLEMENTED, why.to_owned());
            }
            ("activate", "false") => {}
            ("activate", _) => return bad("activate must be true or false\n".to_owned()),
            _ => {}
        }
    }
    text(StatusCode::OK, "heap profiling is not active\n".to_owned())
}

/// Keys and values of a query, decoded.
fn pairs(query: &str) -> impl Iterator<Item = (String, String)> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decoded(key), decoded(value))
        })
}

/// Percent signs with two digits, and plus signs, as forms write them.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        match (first, after) {
            (b'%', [high, low, after @ ..]) => {
                let digits = std::str::from_utf8(&[*high, *low])
                    .ok()
                    .and_then(|digits| u8::from_str_radix(digits, 16).ok());
                match digits {
                    Some(byte) => {
                        bytes.push(byte);
                        rest = after;
                    }
                    None => bytes.push(b'%'),
                }
            }
            (b'+', _) => bytes.push(b' '),
            (byte, _) => bytes.push(*byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn bad(why: String) -> Answer {
    text(StatusCode::BAD_REQUEST, why)
}

fn usage(body: &'static str) -> Answer {
    let mut answer = method_not_allowed("POST");
    *answer.body_mut() = Full::from(Bytes::from_static(body.as_bytes()));
    answer
}

fn html(body: &'static str) -> Answer {
    let mut answer = Response::new(Full::from(Bytes::from_static(body.as_bytes())));
    let html = HeaderValue::from_static("text/html; charset=utf-8");
    answer.headers_mut().insert(CONTENT_TYPE, html);
    answer
}

fn chain(error: &dyn std::error::Error) -> String {
    let source = error.source().map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}

const LOGGING_USAGE: &str = "\
usage: POST /logging                      the current filter
       POST /logging?level=<level>        another level for everything that is not named
       POST /logging?level=<target>=<level>,<level>
       POST /logging?reset[&level=...]    back to the filter of the start first
levels: off, error, warn, info, debug, trace
";

const INDEX: &str = "\
<!DOCTYPE html><title>ztunnel</title><h1>ztunnel</h1><ul>\
<li><a href=\"config_dump\">config_dump</a>: the state of this node\
<li>logging: POST shows or changes the log's filter (<a href=\"logging\">usage</a>)\
<li>quitquitquit: POST drains and ends the process\
<li><a href=\"debug/pprof/profile\">debug/pprof/profile</a>: not in this build\
<li><a href=\"debug/pprof/heap\">debug/pprof/heap</a>: not in this build\
<li><a href=\"debug/pprof/heap/profiling\">debug/pprof/heap/profiling</a>: not in this build\
</ul>
";
