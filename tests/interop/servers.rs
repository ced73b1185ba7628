//! Servers that people run, each started once with a directory of its own: takes a namespace; gives a
//! running program that is reached on every address of it. None of them reads a configuration of the
//! machine.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use nix::unistd::User;
use ztunnel_tests::{
    apps::{self, Server},
    bulk,
    certs::{Authority, Issued},
    netns::Netns,
    process::{Running, finish, output},
    programs::{Redis, wait_accepts},
    topology::Pod,
};

/// All of them, in one pod.
#[derive(Debug)]
pub(crate) struct Servers {
    _running: Vec<Running>,
    _redis: Redis,
    _behind_nginx: Vec<Server>,
    /// For the TLS of the applications: the mesh knows nothing of it.
    pub(crate) root: PathBuf,
    /// What `ssh-keyscan` must find: type and key.
    pub(crate) ssh_key: String,
    pub(crate) psql: PathBuf,
}

impl Servers {
    pub(crate) fn start(pod: &Pod, directory: &Path) -> Result<Self> {
        let netns = &pod.netns;
        let names = [
            "DNS:apps".to_owned(),
            format!("IP:{}", pod.v4),
            format!("IP:{}", pod.v6),
        ];
        let authority = Authority::create(&directory.join("apps-tls"))?;
        let tls = authority.issue(&directory.join("apps-tls"), "apps", &names)?;
        let (mariadb, postgres, (ssh, ssh_key)) = std::thread::scope(|scope| {
            // Both make a new database first, which takes seconds.
            let mariadb = scope.spawn(|| mariadb(netns, directory, &tls));
            let postgres = scope.spawn(|| postgres(netns, directory, &tls));
            let ssh = dropbear(netns, directory)?;
            let joined = |what| move |_| anyhow::anyhow!("starting {what} panicked");
            anyhow::Ok((
                mariadb.join().map_err(joined("mariadb"))??,
                postgres.join().map_err(joined("postgres"))??,
                ssh,
            ))
        })?;
        let behind_nginx = vec![
            Server::start(netns, SINK, sink)?,
            Server::start(netns, WEBSOCKET, websocket)?,
            Server::start(netns, UNSIZED, unsized_answer)?,
        ];
        let redis = Redis::start(netns, REDIS, directory)?;
        let web = nginx(netns, directory, &tls)?;
        let grpc = grpc(netns, directory)?;
        Ok(Self {
            _running: vec![mariadb, postgres.0, ssh, web, grpc],
            _redis: redis,
            _behind_nginx: behind_nginx,
            root: authority.certificate,
            ssh_key,
            psql: postgres.1,
        })
    }
}

fn mariadb(netns: &Netns, directory: &Path, tls: &Issued) -> Result<Running> {
    let home = directory.join("mariadb");
    fs::create_dir_all(&home)?;
    let data = format!("--datadir={}", home.join("data").display());
    let install = [
        "--no-defaults",
        "--user=root",
        &data,
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
    ];
    output(None, "mariadb-install-db", &install, "").context("make a database")?;
    let init = home.join("init.sql");
    fs::write(
        &init,
        format!(
            "CREATE USER '{USER}'@'%' IDENTIFIED BY '{PASSWORD}';\n\
             CREATE DATABASE shop;\n\
             GRANT ALL ON shop.* TO '{USER}'@'%';\n"
        ),
    )?;
    let option = |name: &str, file: &Path| format!("--{name}={}", file.display());
    let mut command = Command::new("mariadbd");
    command.args(["--no-defaults", "--user=root", &data]);
    command.args(["--bind-address=*", "--skip-name-resolve", "--skip-log-bin"]);
    command.args(["--innodb-buffer-pool-size=32M", "--performance-schema=OFF"]);
    command
        .arg(format!("--port={MARIADB}"))
        .arg(option("socket", &home.join("socket")))
        .arg(option("pid-file", &home.join("pid")))
        .arg(option("init-file", &init))
        .arg(option("ssl-ca", &tls.root))
        .arg(option("ssl-cert", &tls.certificate))
        .arg(option("ssl-key", &tls.key));
    let mut running = Running::start("mariadbd", Some(netns), command)?;
    wait_accepts(&mut running, netns, MARIADB).context("mariadbd")?;
    Ok(running)
}

/// It refuses to be root, so it is the user that its package made.
fn postgres(netns: &Netns, directory: &Path, tls: &Issued) -> Result<(Running, PathBuf)> {
    let programs = newest_postgres()?;
    let user = User::from_name("postgres")?.context("no user postgres")?;
    let own = |path: &Path| chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()));
    let home = directory.join("postgres");
    fs::create_dir_all(&home)?;
    own(&home)?;
    let data = home.join("data");
    let mut initdb = as_user("postgres", &programs.join("initdb"));
    initdb.args(["--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"]);
    initdb.arg("--pgdata").arg(&data).current_dir(&home);
    finish(None, &mut initdb).context("make a database")?;
    for (from, name) in [(&tls.key, "server.key"), (&tls.certificate, "server.crt")] {
        let to = data.join(name);
        fs::copy(from, &to)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o600))?;
        own(&to)?;
    }
    fs::write(
        data.join("pg_hba.conf"),
        "hostssl all all all trust\nlocal all all trust\n",
    )?;
    let mut command = as_user("postgres", &programs.join("postgres"));
    command.arg("-D").arg(&data).current_dir(&home);
    command.args(["-p", &POSTGRES.to_string()]);
    for setting in ["listen_addresses=*", "ssl=on", "fsync=off"] {
        command.args(["-c", setting]);
    }
    command.arg("-c");
    command.arg(format!("unix_socket_directories={}", home.display()));
    let mut running = Running::start("postgres", Some(netns), command)?;
    wait_accepts(&mut running, netns, POSTGRES).context("postgres")?;
    Ok((running, programs.join("psql")))
}

fn newest_postgres() -> Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").context("no PostgreSQL")?;
    let mut programs: Vec<_> = versions
        .filter_map(|version| Some(version.ok()?.path().join("bin")))
        .filter(|programs| programs.join("postgres").is_file())
        .collect();
    programs.sort();
    programs.pop().context("no PostgreSQL")
}

/// Changing the user undoes the death with the parent, so it is asked for again. Shared memory goes
/// with its namespace, however the program ends.
fn as_user(user: &str, program: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--ipc", "--", "setpriv"]);
    command.args(["--reuid", user, "--regid", user, "--clear-groups"]);
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

fn dropbear(netns: &Netns, directory: &Path) -> Result<(Running, String)> {
    let key = directory.join("ssh-host-key");
    let mut generate = Command::new("dropbearkey");
    generate.args(["-t", "ed25519", "-f"]).arg(&key);
    let said = finish(None, &mut generate)?;
    let line = said.lines().find(|line| line.starts_with("ssh-ed25519 "));
    let words: Vec<_> = line.context("no public key")?.split(' ').take(2).collect();
    let mut command = Command::new("dropbear");
    // In the foreground, to standard error, without passwords.
    command.args(["-F", "-E", "-s", "-p", &SSH.to_string(), "-r"]);
    command.arg(&key).arg("-P").arg(directory.join("ssh-pid"));
    let mut running = Running::start("dropbear", Some(netns), command)?;
    wait_accepts(&mut running, netns, SSH).context("dropbear")?;
    Ok((running, words.join(" ")))
}

fn grpc(netns: &Netns, directory: &Path) -> Result<Running> {
    let script = grpc_script(directory)?;
    let mut command = Command::new(PYTHON);
    command.arg(script).args(["serve", &GRPC.to_string()]);
    let mut running = Running::start("grpc", Some(netns), command)?;
    wait_accepts(&mut running, netns, GRPC).context("the gRPC server")?;
    Ok(running)
}

/// The script for both sides of gRPC.
pub(crate) fn grpc_script(directory: &Path) -> Result<PathBuf> {
    let path = directory.join("grpc_echo.py");
    if !path.is_file() {
        fs::write(&path, include_str!("grpc_echo.py"))?;
    }
    Ok(path)
}

fn nginx(netns: &Netns, directory: &Path, tls: &Issued) -> Result<Running> {
    let home = directory.join("nginx-apps");
    fs::create_dir_all(&home)?;
    fs::write(home.join("file"), FILE)?;
    let config = home.join("nginx.conf");
    fs::write(&config, nginx_configuration(&home, tls))?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(&home).arg("-c").arg(&config);
    command.args(["-e", "stderr"]);
    let mut running = Running::start("nginx", Some(netns), command)?;
    wait_accepts(&mut running, netns, HTTP).context("nginx")?;
    Ok(running)
}

fn nginx_configuration(home: &Path, tls: &Issued) -> String {
    let (certificate, key) = (tls.certificate.display(), tls.key.display());
    let home = home.display();
    format!(
        "daemon off; master_process off; pid {home}/pid;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n\
         access_log off;\n\
         client_body_temp_path {home}/body; proxy_temp_path {home}/proxy;\n\
         fastcgi_temp_path {home}/fastcgi; uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;\n\
         default_type text/plain;\n\
         ssl_certificate {certificate}; ssl_certificate_key {key};\n\
         server {{\n\
         listen {HTTP}; listen [::]:{HTTP};\n\
         listen {HTTP2} http2; listen [::]:{HTTP2} http2;\n\
         listen {HTTPS} ssl http2; listen [::]:{HTTPS} ssl http2;\n\
         location = /whoami {{ return 200 '$remote_addr\\n'; }}\n\
         location = /nothing {{ return 204; }}\n\
         location = /file {{ root {home}; }}\n\
         location = /unsized {{ proxy_pass http://127.0.0.1:{UNSIZED}; }}\n\
         location = /upload {{\n\
         client_max_body_size 0; proxy_request_buffering off; proxy_http_version 1.1;\n\
         proxy_read_timeout 300s; proxy_pass http://127.0.0.1:{SINK};\n\
         }}\n\
         location = /socket {{\n\
         proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade;\n\
         proxy_set_header Connection upgrade; proxy_pass http://127.0.0.1:{WEBSOCKET};\n\
         }}\n\
         location / {{ return 200 '$uri\\n'; }}\n\
         }}\n\
         }}\n"
    )
}

/// Takes an upload whose length is known and says how much came, and its checksum.
fn sink(mut stream: TcpStream) -> io::Result<()> {
    let head = head(&mut stream)?;
    let length = |line: &str| {
        let (name, value) = line.split_once(':')?;
        let ours = name.eq_ignore_ascii_case("content-length");
        ours.then(|| value.trim().parse().ok()).flatten()
    };
    let length: u64 = head
        .lines()
        .find_map(length)
        .ok_or(io::ErrorKind::InvalidData)?;
    let sum = bulk::receive(&mut stream, length)?;
    answer(&mut stream, &format!("{length} {sum:016x}\n"))
}

/// Switches protocols as RFC 6455 has it for its own example key, then sends back what it receives.
fn websocket(mut stream: TcpStream) -> io::Result<()> {
    let head = head(&mut stream)?;
    if !head.contains(WEBSOCKET_KEY) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    write!(
        stream,
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {WEBSOCKET_ACCEPT}\r\n\r\n"
    )?;
    apps::echo(stream)
}

/// An answer that ends with the connection: nginx makes chunks of it.
fn unsized_answer(mut stream: TcpStream) -> io::Result<()> {
    head(&mut stream)?;
    stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n")?;
    for _ in 0..UNSIZED_LINES {
        stream.write_all(UNSIZED_LINE)?;
    }
    Ok(())
}

fn answer(stream: &mut TcpStream, body: &str) -> io::Result<()> {
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

fn head(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.extend(byte);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

pub(crate) const MARIADB: u16 = 3306;
pub(crate) const POSTGRES: u16 = 5432;
pub(crate) const REDIS: u16 = 6379;
pub(crate) const SSH: u16 = 22;
pub(crate) const HTTP: u16 = 80;
pub(crate) const HTTP2: u16 = 81;
pub(crate) const HTTPS: u16 = 443;
pub(crate) const GRPC: u16 = 50051;
/// Those that clients know.
pub(crate) const PORTS: [u16; 8] = [MARIADB, POSTGRES, REDIS, SSH, HTTP, HTTP2, HTTPS, GRPC];
const SINK: u16 = 8090;
const WEBSOCKET: u16 = 8091;
const UNSIZED: u16 = 8092;
pub(crate) const USER: &str = "shopper";
pub(crate) const PASSWORD: &str = "not a secret";
/// What `/file` answers.
pub(crate) const FILE: &str = "a file that does not change\n";
pub(crate) const UNSIZED_LINE: &[u8] =
    b"a line of an answer whose length nobody knows beforehand\n";
pub(crate) const UNSIZED_LINES: usize = 2000;
pub(crate) const WEBSOCKET_KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
pub(crate) const WEBSOCKET_ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
/// Debian's, whose packages setup installs.
pub(crate) const PYTHON: &str = "/usr/bin/python3";
