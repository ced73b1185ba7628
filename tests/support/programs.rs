//! Real programs as applications: nginx as a server, curl as a client. Takes a namespace; gives what
//! the program itself reports about its connections; never uses a configuration of the machine.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    netns::Netns,
    process::{Running, output},
    wait,
};

/// An nginx that serves one port on IPv4 and IPv6.
///
/// `GET /whoami` answers `peer=<address>` and `server=<address>` as nginx sees them; every other path
/// answers its own name.
#[derive(Debug)]
pub struct Nginx {
    running: Running,
    access_log: PathBuf,
}

impl Nginx {
    /// Starts it and waits until it accepts. Its files live in `directory`.
    pub fn start(netns: &Netns, port: u16, directory: &Path) -> Result<Self> {
        let home = directory.join(format!("nginx-{netns}-{port}"));
        fs::create_dir_all(&home)?;
        let config = home.join("nginx.conf");
        let access_log = home.join("access.log");
        fs::write(&config, configuration(&home, port))?;
        let mut command = Command::new("nginx");
        command
            .arg("-p")
            .arg(&home)
            .arg("-c")
            .arg(&config)
            .arg("-e")
            .arg("stderr");
        let mut running = Running::start("nginx", Some(netns), command)
            .context("nginx is needed (Debian package nginx)")?;
        wait_accepts(&mut running, netns, port)?;
        Ok(Self {
            running,
            access_log,
        })
    }

    /// Requests so far, one line each: `<client> <client port> <server> "<request line>"`.
    pub fn requests(&self) -> Result<Vec<String>> {
        let text = fs::read_to_string(&self.access_log).context("read nginx's access log")?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }
}

/// A Redis that keeps nothing on disk, on one port, IPv4 and IPv6.
#[derive(Debug)]
pub struct Redis {
    running: Running,
}

impl Redis {
    /// Starts it and waits until it accepts.
    pub fn start(netns: &Netns, port: u16, directory: &Path) -> Result<Self> {
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "0.0.0.0", "::"]);
        command.args(["--protected-mode", "no", "--save", "", "--appendonly", "no"]);
        command.arg("--dir").arg(directory);
        let mut running = Running::start("redis", Some(netns), command)
            .context("redis-server is needed (Debian package redis-server)")?;
        wait_accepts(&mut running, netns, port)?;
        Ok(Self { running })
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }
}

/// Waits until something accepts on this port of the loopback; fails at once if the program ends.
pub fn wait_accepts(running: &mut Running, netns: &Netns, port: u16) -> Result<()> {
    let here = SocketAddr::from(([127, 0, 0, 1], port));
    let what = format!("port {port} to accept");
    let accepts = wait::until(&what, START, || {
        running.ended().ok()?.map_or_else(
            || netns.dial(here, PATIENCE).ok().map(drop).map(Ok),
            |status| Some(Err(status)),
        )
    });
    let said = || running.log().lines().join("\n");
    ensure!(
        accepts.with_context(said)?.is_ok(),
        "it ended at once:\n{}",
        said()
    );
    Ok(())
}

/// What curl received and saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    pub status: u16,
    pub body: String,
    pub local: SocketAddr,
    pub peer: SocketAddr,
    pub took: Duration,
}

/// Fetches `http://<to><path>` with curl, with these header lines.
pub fn curl(netns: &Netns, to: SocketAddr, path: &str, headers: &[&str]) -> Result<Fetched> {
    curl_within(netns, to, path, headers, PATIENCE)
}

/// The same with a deadline of its own.
pub fn curl_within(
    netns: &Netns,
    to: SocketAddr,
    path: &str,
    headers: &[&str],
    patience: Duration,
) -> Result<Fetched> {
    let url = format!("http://{to}{path}");
    let patience = format!("{:.3}", patience.as_secs_f64());
    let mut args = vec![
        "--silent",
        "--show-error",
        "--noproxy",
        "*",
        "--max-time",
        &patience,
        "--write-out",
    ];
    args.push(WRITE_OUT);
    args.extend(headers.iter().flat_map(|line| ["--header", *line]));
    args.push(&url);
    let text = output(Some(netns), "curl", &args, "")?;
    let (body, facts) = text.rsplit_once('\n').context("curl told nothing")?;
    let mut facts = facts.split(' ');
    let mut next = || facts.next().context("curl told too little");
    let (status, local_ip, local_port) = (next()?.parse()?, next()?.parse()?, next()?.parse()?);
    let (peer_ip, peer_port, took) = (next()?.parse()?, next()?.parse()?, next()?.parse()?);
    Ok(Fetched {
        status,
        body: body.to_owned(),
        local: SocketAddr::new(local_ip, local_port),
        peer: SocketAddr::new(peer_ip, peer_port),
        took: Duration::from_secs_f64(took),
    })
}

fn configuration(home: &Path, port: u16) -> String {
    let home = home.display();
    format!(
        "daemon off;\n\
         # One process: nothing is left when it is killed.\n\
         master_process off;\n\
         pid {home}/pid;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n\
         log_format facts '$remote_addr $remote_port $server_addr \"$request\"';\n\
         access_log {home}/access.log facts;\n\
         client_body_temp_path {home}/body;\n\
         proxy_temp_path {home}/proxy;\n\
         fastcgi_temp_path {home}/fastcgi;\n\
         uwsgi_temp_path {home}/uwsgi;\n\
         scgi_temp_path {home}/scgi;\n\
         default_type text/plain;\n\
         server {{\n\
         listen {port};\n\
         listen [::]:{port};\n\
         location = /whoami {{\n\
         return 200 'peer=$remote_addr\\nserver=$server_addr\\n';\n\
         }}\n\
         location / {{ return 200 '$uri\\n'; }}\n\
         }}\n\
         }}\n"
    )
}

const WRITE_OUT: &str =
    "\n%{http_code} %{local_ip} %{local_port} %{remote_ip} %{remote_port} %{time_total}";
const PATIENCE: Duration = Duration::from_secs(60);
/// A database that recovers, on a machine that does much else.
const START: Duration = Duration::from_secs(180);
