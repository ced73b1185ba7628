//! What a user of each application does with it, and what must come of it: takes a client's namespace
//! and the server's address; gives nothing, or the first thing that was wrong. Each row asks the server
//! who the client is, where the protocol can tell.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps, bulk,
    netns::Netns,
    process::{finish, output},
};

use crate::servers::{
    FILE, GRPC, HTTP, HTTP2, HTTPS, MARIADB, PASSWORD, POSTGRES, PYTHON, REDIS, SSH, Servers,
    UNSIZED_LINE, UNSIZED_LINES, USER, WEBSOCKET_ACCEPT, WEBSOCKET_KEY, grpc_script,
};

/// One client, one address of the server.
pub(crate) struct Way<'a> {
    pub(crate) from: &'a Netns,
    /// The server's address.
    pub(crate) to: IpAddr,
    /// The client's own, which the server must see.
    pub(crate) own: IpAddr,
    pub(crate) servers: &'a Servers,
    pub(crate) directory: &'a Path,
}

impl Way<'_> {
    fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.to, port)
    }

    fn run(&self, program: &str, args: &[&str], input: &str) -> Result<String> {
        output(Some(self.from), program, args, input)
    }

    /// What the server says of the client must be the client's own address.
    fn is_own(&self, said: &str) -> Result<()> {
        let seen: IpAddr = said.trim().parse().with_context(|| format!("{said:?}"))?;
        let (seen, own) = (seen.to_canonical(), self.own);
        ensure!(seen == own, "the server sees {seen}, the client is {own}");
        Ok(())
    }
}

pub(crate) type Row = (&'static str, fn(&Way<'_>) -> Result<()>);

/// Every row that is quick.
pub(crate) const ROWS: [Row; 11] = [
    ("MariaDB", |way| mariadb(way, false)),
    ("MariaDB with TLS", |way| mariadb(way, true)),
    ("PostgreSQL with TLS", postgres),
    ("Redis", redis),
    ("SSH", ssh),
    ("HTTP/1.1", http),
    ("HTTP/1.1 by curl", http_by_curl),
    ("WebSocket", websocket),
    ("HTTP/2", http2),
    ("HTTPS", https),
    ("gRPC", grpc),
];

fn mariadb(way: &Way<'_>, tls: bool) -> Result<()> {
    let (to, port) = (way.to.to_string(), MARIADB.to_string());
    let password = format!("--password={PASSWORD}");
    let root = format!("--ssl-ca={}", way.servers.root.display());
    let mut args = vec!["--no-defaults", "--protocol=tcp", "-h", &to, "-P", &port];
    args.extend(["-u", USER, &password, "-N", "-B", "shop"]);
    if tls {
        args.extend([root.as_str(), "--ssl-verify-server-cert"]);
    } else {
        args.push("--skip-ssl");
    }
    let script = "SELECT SUBSTRING_INDEX(USER(), '@', -1);\n\
                  SHOW STATUS LIKE 'Ssl_version';\n\
                  CREATE TEMPORARY TABLE t (v LONGTEXT);\n\
                  INSERT INTO t VALUES (REPEAT('x', 300000)), (REPEAT('y', 3000000));\n\
                  SELECT LENGTH(v) FROM t ORDER BY 1;\n\
                  SELECT v FROM t ORDER BY LENGTH(v) DESC;\n";
    let said = way.run("mariadb", &args, script)?;
    let lines: Vec<_> = said.lines().collect();
    let [client, version, short, long, ys, xs] = lines[..] else {
        anyhow::bail!("{} lines: {:?}", lines.len(), lines.first());
    };
    way.is_own(client)?;
    let encrypted = version.trim_start_matches("Ssl_version").trim();
    ensure!(encrypted.is_empty() != tls, "its TLS is {encrypted:?}");
    ensure!((short, long) == ("300000", "3000000"), "{short} {long}");
    ensure!(ys.len() == 3_000_000 && ys.bytes().all(|b| b == b'y'));
    ensure!(xs.len() == 300_000 && xs.bytes().all(|b| b == b'x'));
    Ok(())
}

fn postgres(way: &Way<'_>) -> Result<()> {
    let target = format!(
        "host={} port={POSTGRES} user=postgres dbname=postgres sslmode=verify-full sslrootcert={}",
        way.to,
        way.servers.root.display()
    );
    let mut command = Command::new(&way.servers.psql);
    command.args(["--no-psqlrc", "-A", "-t", "-q", "-d", &target]);
    for statement in [
        "SELECT host(inet_client_addr())",
        "SELECT ssl, version FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
        "COPY (SELECT generate_series(1, 50000)) TO STDOUT",
        "SELECT md5(string_agg(n::text, '')) FROM generate_series(1, 50000) n",
    ] {
        command.args(["-c", statement]);
    }
    let said = finish(Some(way.from), &mut command)?;
    let lines: Vec<_> = said.lines().collect();
    ensure!(lines.len() == 50_003, "{} lines", lines.len());
    way.is_own(lines.first().context("no client")?)?;
    let tls = lines.get(1).context("no TLS")?;
    ensure!(tls.starts_with("t|TLSv1.3"), "its TLS is {tls}");
    let numbers = lines.iter().skip(2).take(50_000);
    for (number, line) in (1..).zip(numbers) {
        ensure!(*line == format!("{number}"), "{line} instead of {number}");
    }
    Ok(())
}

fn redis(way: &Way<'_>) -> Result<()> {
    let (to, port) = (way.to.to_string(), REDIS.to_string());
    let base = ["-h", to.as_str(), "-p", port.as_str()];
    let ask = |args: &[&str], input: &str| way.run("redis-cli", &[&base, args].concat(), input);
    ensure!(ask(&["PING"], "")?.trim() == "PONG");
    let info = ask(&["CLIENT", "INFO"], "")?;
    let address = info.split(' ').find_map(|word| word.strip_prefix("addr="));
    let address = address.and_then(|address| address.rsplit_once(':'));
    let (client, _) = address.with_context(|| info.clone())?;
    way.is_own(client.trim_matches(['[', ']']))?;
    let value: String = (0..100_000).map(|number| format!("{number},")).collect();
    ensure!(ask(&["-x", "SET", "key"], &value)?.trim() == "OK");
    ensure!(ask(&["GET", "key"], "")?.trim_end() == value);
    // Many commands on one connection, sent without waiting.
    let many: String = (0..1000).map(|n| format!("ECHO {n}\n")).collect();
    let expected: String = (0..1000).map(|n| format!("{n}\n")).collect();
    let said = ask(&[], &many)?.replace('"', "");
    ensure!(said == expected, "{} bytes", said.len());
    Ok(())
}

/// The server speaks first, and proves with its key that nobody changed a byte.
fn ssh(way: &Way<'_>) -> Result<()> {
    let to = way.to.to_string();
    let port = SSH.to_string();
    let said = way.run(
        "ssh-keyscan",
        &["-T", "120", "-t", "ed25519", "-p", &port, &to],
        "",
    )?;
    ensure!(said.contains(&way.servers.ssh_key), "{said}");
    Ok(())
}

fn http(way: &Way<'_>) -> Result<()> {
    let stream = apps::dial(way.from, way.at(HTTP))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let ask = |requests: &str| (&stream).write_all(requests.as_bytes());
    let request = |path: &str, more: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n{more}\r\n");
    // All on one connection, one after the other.
    ask(&request("/whoami", ""))?;
    let answer = Answer::read(&mut reader, true)?;
    ensure!(answer.status == 200, "{answer:?}");
    way.is_own(&String::from_utf8_lossy(&answer.body))?;
    ask(&request("/nothing", ""))?;
    let answer = Answer::read(&mut reader, true)?;
    ensure!((answer.status, answer.body.len()) == (204, 0), "{answer:?}");
    ask(&request("/file", ""))?;
    let answer = Answer::read(&mut reader, true)?;
    ensure!(answer.body == FILE.as_bytes(), "{answer:?}");
    let tag = answer.header("etag").context("no ETag")?;
    ask(&request("/file", &format!("If-None-Match: {tag}\r\n")))?;
    let answer = Answer::read(&mut reader, true)?;
    ensure!((answer.status, answer.body.len()) == (304, 0), "{answer:?}");
    ask(&request("/file", "").replace("GET", "HEAD"))?;
    let answer = Answer::read(&mut reader, false)?;
    ensure!(answer.header("content-length").is_some(), "{answer:?}");
    ask(&request("/unsized", ""))?;
    let answer = Answer::read(&mut reader, true)?;
    ensure!(
        answer.header("transfer-encoding") == Some("chunked"),
        "{answer:?}"
    );
    ensure!(answer.body == UNSIZED_LINE.repeat(UNSIZED_LINES));
    // All at once.
    let paths: Vec<_> = (0..20).map(|number| format!("/{number}")).collect();
    let requests: String = paths.iter().map(|path| request(path, "")).collect();
    ask(&requests)?;
    for path in paths {
        let answer = Answer::read(&mut reader, true)?;
        ensure!(answer.body == format!("{path}\n").as_bytes(), "{answer:?}");
    }
    ask(&request("/last", "Connection: close\r\n"))?;
    let answer = Answer::read(&mut reader, true)?;
    ensure!(answer.header("connection") == Some("close"), "{answer:?}");
    let more = reader.read(&mut [0]).context("wait for the end")?;
    ensure!(more == 0, "bytes after the end");
    upload(way, 1 << 20)
}

/// A body that nginx hands on while it comes.
pub(crate) fn upload(way: &Way<'_>, bytes: u64) -> Result<()> {
    let mut stream = apps::dial(way.from, way.at(HTTP))?;
    write!(
        stream,
        "POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: {bytes}\r\n\r\n"
    )?;
    let sum = bulk::send(&mut stream, bytes, 3)?;
    let answer = Answer::read(&mut BufReader::new(stream), true)?;
    let expected = format!("{bytes} {sum:016x}\n");
    ensure!(answer.body == expected.as_bytes(), "{answer:?}");
    Ok(())
}

fn http_by_curl(way: &Way<'_>) -> Result<()> {
    let at = way.at(HTTP);
    let (first, second) = (format!("http://{at}/1"), format!("http://{at}/2"));
    let mut args = CURL.to_vec();
    args.extend(["--write-out", "%{http_code} %{num_connects}\n"]);
    args.extend([first.as_str(), second.as_str()]);
    let said = way.run("curl", &args, "")?;
    ensure!(said == "/1\n200 1\n/2\n200 0\n", "{said}");
    Ok(())
}

fn websocket(way: &Way<'_>) -> Result<()> {
    let stream = apps::dial(way.from, way.at(HTTP))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    write!(
        &stream,
        "GET /socket HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {WEBSOCKET_KEY}\r\n\r\n"
    )?;
    let answer = Answer::read(&mut reader, false)?;
    ensure!(answer.status == 101, "{answer:?}");
    let accepted = answer.header("sec-websocket-accept");
    ensure!(accepted == Some(WEBSOCKET_ACCEPT), "{answer:?}");
    for number in 0..100_u8 {
        // A masked text frame of five bytes.
        let frame = [0x81, 0x85, 1, 2, 3, 4, number, 1, 2, 3, 4];
        (&stream).write_all(&frame)?;
        let mut back = [0; 11];
        reader.read_exact(&mut back)?;
        ensure!(back == frame, "frame {number}: {back:?}");
    }
    Ok(())
}

/// In plain TCP, with prior knowledge. One request: this curl fails when it asks again on such a
/// connection; many at once are gRPC's and HTTPS's.
fn http2(way: &Way<'_>) -> Result<()> {
    let url = format!("http://{}/unsized", way.at(HTTP2));
    let mut args = CURL.to_vec();
    args.extend([
        "--http2-prior-knowledge",
        "--write-out",
        "%{http_version} %{http_code}",
        &url,
    ]);
    let said = way.run("curl", &args, "")?;
    let body = said.strip_suffix("2 200").context("not HTTP/2")?;
    ensure!(
        body.as_bytes() == UNSIZED_LINE.repeat(UNSIZED_LINES),
        "{} bytes",
        body.len()
    );
    Ok(())
}

/// First one request, then many at once on one connection.
fn https(way: &Way<'_>) -> Result<()> {
    let at = way.at(HTTPS);
    let (one, many) = (
        format!("https://{at}/whoami"),
        format!("https://{at}/[1-50]"),
    );
    let root = way.servers.root.display().to_string();
    let ask = |url: &str| {
        let mut args = CURL.to_vec();
        args.extend(["--cacert", &root, "--parallel", "--write-out"]);
        args.extend(["%{http_version} %{http_code} %{ssl_verify_result}\n", url]);
        way.run("curl", &args, "")
    };
    let said = ask(&one)?;
    let (client, facts) = said.split_once('\n').context("no answer")?;
    way.is_own(client)?;
    ensure!(facts == "2 200 0\n", "{facts}");
    let said = ask(&many)?;
    let good = said.lines().filter(|line| *line == "2 200 0").count();
    let bodies = said.lines().filter(|line| line.starts_with('/')).count();
    ensure!((good, bodies) == (50, 50), "{said}");
    Ok(())
}

fn grpc(way: &Way<'_>) -> Result<()> {
    let script = grpc_script(way.directory)?;
    let at = way.at(GRPC).to_string();
    let script = script.to_string_lossy();
    let said = way.run(PYTHON, &[&script, "ask", &at], "")?;
    ensure!(said == "ok\n", "{said}");
    Ok(())
}

/// An answer of HTTP/1.1, its body put together.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Answer {
    fn read(reader: &mut BufReader<TcpStream>, has_body: bool) -> Result<Self> {
        let mut line = || -> Result<String> {
            let mut line = String::new();
            ensure!(reader.read_line(&mut line)? > 0, "the connection ended");
            Ok(line.trim_end().to_owned())
        };
        let first = line()?;
        let status = first.split(' ').nth(1).context("no status")?.parse()?;
        let mut headers = Vec::new();
        loop {
            let header = line()?;
            if header.is_empty() {
                break;
            }
            let (name, value) = header.split_once(':').context("no colon")?;
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut answer = Self {
            status,
            headers,
            body: Vec::new(),
        };
        if has_body {
            answer.read_body(reader)?;
        }
        Ok(answer)
    }

    fn read_body(&mut self, reader: &mut BufReader<TcpStream>) -> Result<()> {
        if let Some(length) = self.header("content-length") {
            self.body = vec![0; length.parse()?];
            reader.read_exact(&mut self.body)?;
        } else if self.header("transfer-encoding").is_some() {
            loop {
                let mut line = String::new();
                reader.read_line(&mut line)?;
                let size = usize::from_str_radix(line.trim(), 16).context("chunk size")?;
                let mut chunk = vec![0; size + 2];
                reader.read_exact(&mut chunk)?;
                if size == 0 {
                    break;
                }
                chunk.truncate(size);
                self.body.extend(chunk);
            }
        }
        Ok(())
    }

    fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }
}

const CURL: [&str; 6] = [
    "--silent",
    "--show-error",
    "--noproxy",
    "*",
    "--max-time",
    "120",
];
