//! Bad input and bad days at the start: the process says what is wrong and what to do, leaves at
//! once, and has changed nothing. While it runs, a bad file changes nothing either.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, ensure};
use ztunnel_tests::{
    apps::{self, Server},
    inspect::Routing,
    meshfile::MeshFile,
    process::output,
    topology::{Builder, Topology},
    ztunnel::{Node, Settings, binary},
};

use crate::mesh::{Mesh, PATIENCE, WATCH, assert_echo, wrapper};

fn pods() -> Builder {
    Topology::builder().pod("client", "a").pod("server", "b")
}

/// Starts node a and asserts that it ends by itself, soon, unsuccessfully, naming each of `says`, and
/// with nothing changed.
fn refuses(topology: &Topology, text: &str, settings: Settings, says: &[&str]) -> Result<()> {
    let pod = &topology.pod("client")?.netns;
    let before = Routing::of(pod)?;
    let mut node = Node::launch(topology, "a", text, settings)?;
    let status = node.wait_exit(Duration::from_secs(120)).with_context(|| {
        format!(
            "it should refuse to start:\n{}",
            node.log().lines().join("\n")
        )
    })?;
    // Its last words may still be in the pipe; at their end the log says that nobody writes.
    drop(
        node.log()
            .wait_for("the end of the log", PATIENCE, |_| None::<()>),
    );
    let said = node.log().lines().join("\n");
    ensure!(
        status.code().is_some_and(|code| code != 0),
        "{status}: {said}"
    );
    for word in says {
        ensure!(
            said.to_lowercase().contains(&word.to_lowercase()),
            "no {word:?} in: {said}"
        );
    }
    ensure!(!said.contains("panicked"), "it panicked: {said}");
    let pins = fs::read_dir(node.pins()).map_or(0, Iterator::count);
    ensure!(pins == 0, "{pins} pins are left; it said: {said}");
    ensure!(
        Routing::of(pod)? == before,
        "the pod's routing has changed; it said: {said}"
    );
    Ok(())
}

#[test]
fn a_broken_revocation_list_is_refused_at_the_start() -> Result<()> {
    let topology = pods().build()?;
    let text = MeshFile::of(&topology).for_node("a");
    let path = topology.directory()?.join("crl.pem");
    fs::write(
        &path,
        "-----BEGIN X509 CRL-----\nMAMCAQE=\n-----END X509 CRL-----\n",
    )?;
    let name = path.display().to_string();
    let settings = Settings::of(&topology)?.env("CRL_PATH", &name);
    refuses(&topology, &text, settings, &[&name, "revocation list 1"])
}

/// A file that is wrong, and what the answer must name.
struct Bad {
    name: &'static str,
    text: String,
    says: &'static [&'static str],
}

fn bad(name: &'static str, text: impl Into<String>, says: &'static [&'static str]) -> Bad {
    let text = text.into();
    Bad { name, text, says }
}

/// Files that are wrong as a whole, or in `workloads` and `pods`. The first workload of `good` is the
/// pod `client`.
fn bad_files(good: &str) -> Vec<Bad> {
    let half: String = good.chars().take(good.len() / 2).collect();
    let again = "workloads:\n  - uid: again\n    name: again\n    namespace: demo\n    \
                 workloadIps: [\"10.88.1.10\"]\n    services: {}\n";
    let workload = |from: &str, to: &str| good.replacen(from, to, 1);
    let server_uid = "uid: demo//Pod/demo/server";
    let items = good.split_once("pods:\n").map_or("", |(_, items)| items);
    vec![
        bad("empty", "", &["empty"]),
        bad("truncated", half + "\n  - {", &["a.yaml:1"]),
        bad("not YAML", "\u{1}{]: what is this", &[]),
        bad(
            "an executable",
            "\u{7f}ELF\u{2}\u{1}\u{1}\0\0\0".repeat(1000),
            &[],
        ),
        bad("a list", "- 1\n- 2\n", &[]),
        bad(
            "wrong types",
            workload("workloads:\n", "workloads: 7\nx:\n"),
            &["a.yaml:1:12", "workloads"],
        ),
        bad(
            "an address of letters",
            workload("10.88.1.10", "ten.dot"),
            &["ten.dot"],
        ),
        bad(
            "an address twice",
            workload("workloads:\n", again),
            &["10.88.1.10"],
        ),
        bad(
            "a uid twice",
            workload(server_uid, "uid: demo//Pod/demo/client"),
            &["demo//Pod/demo/client"],
        ),
        bad("a pod twice", format!("{good}{items}"), &["client"]),
        bad(
            "an unknown key",
            format!("{good}flavour: sweet\n"),
            &["flavour"],
        ),
        bad(
            "an unknown key of a pod",
            workload("    netns:", "    flavour: x\n    netns:"),
            &["flavour"],
        ),
        bad(
            "an unknown protocol",
            workload("protocol: HBONE", "protocol: HBONF"),
            &["HBONF"],
        ),
        bad(
            "a key twice",
            format!("{good}workloads: []\n"),
            &["workloads"],
        ),
        bad("an alias bomb", bomb(), &[]),
        bad("huge", "#".repeat((64 << 20) + 1), &["more than"]),
    ]
}

/// Files that are wrong in a service or a policy.
fn bad_rules(good: &str) -> Vec<Bad> {
    let service = "services:\n  - name: web\n    namespace: demo\n    \
                   hostname: web.demo.svc.cluster.local\n    vips: [\"/10.96.0.1\"]\n    \
                   ports: {80: 9000}\n";
    let with = |section: &str| good.replace("pods:\n", &format!("{section}pods:\n"));
    let with_service = |from: &str, to: &str| with(&service.replace(from, to));
    let policy = |matches: &str| {
        with(&format!(
            "policies:\n  - name: one\n    namespace: demo\n    scope: Namespace\n    \
             action: Allow\n    dryRun: false\n    rules:\n    - - - {matches}\n"
        ))
    };
    let again = service.replace("services:\n", "");
    vec![
        bad(
            "a service twice",
            with(&format!("{service}{again}")),
            &["web"],
        ),
        bad("port 70000", with_service("9000", "70000"), &["70000"]),
        bad("port -1", with_service("9000", "-1"), &["-1"]),
        bad(
            "a VIP of letters",
            with_service("10.96.0.1", "ten.dot"),
            &["ten.dot"],
        ),
        bad(
            "prefix 64 for IPv4",
            policy("sourceIps: [\"10.0.0.0/64\"]"),
            &["10.0.0.0/64"],
        ),
        bad(
            "prefix 129 for IPv6",
            policy("notSourceIps: [\"fd00::/129\"]"),
            &["fd00::/129"],
        ),
        bad(
            "port 70000 in a policy",
            policy("destinationPorts: [70000]"),
            &["70000"],
        ),
        bad("an unknown match", policy("colours: [red]"), &["colours"]),
        bad(
            "a string of no kind",
            policy("principals: [{Nearly: x}]"),
            &["Nearly"],
        ),
    ]
}

// B114, B107.
#[test]
fn a_bad_file_at_the_start_is_refused_by_name_and_place() -> Result<()> {
    let topology = pods().build()?;
    let good = MeshFile::of(&topology).for_node("a");
    let settings = Settings::of(&topology)?;
    let mut failures = Vec::new();
    for Bad { name, text, says } in bad_files(&good).into_iter().chain(bad_rules(&good)) {
        let says = [says, &["a.yaml"]].concat();
        if let Err(error) = refuses(&topology, &text, settings.clone(), &says) {
            failures.push(format!("{name}: {error:#}"));
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n\n"));
    Ok(())
}

#[test]
fn a_bad_file_while_running_is_refused_and_the_state_stays() -> Result<()> {
    let mesh = Mesh::start(pods(), MeshFile::of)?;
    let (client, server) = (mesh.pod("client")?, mesh.pod("server")?);
    let _app = Server::start(&server.netns, 9000, apps::echo)?;
    let good = fs::read_to_string(mesh.a.file())?;
    let sniffer = mesh.sniffer()?;
    let mut failures = Vec::new();
    for Bad { name, text, says } in bad_files(&good).into_iter().chain(bad_rules(&good)) {
        let mark = mesh.a.log().mark();
        mesh.a.overwrite_file(&text)?;
        let refused = mesh
            .a
            .log()
            .wait_since(mark, "the refusal", PATIENCE, |line| {
                // The file may be seen between its truncation and its writing.
                let half = line.contains("empty file") && !text.trim().is_empty();
                let refusal = line.contains("refused") && line.contains("a.yaml");
                (refusal && !half).then(|| line.to_owned())
            });
        match refused {
            Err(error) => failures.push(format!("{name}: {error:#}")),
            Ok(line) => failures.extend(
                says.iter()
                    .filter(|word| !line.to_lowercase().contains(&word.to_lowercase()))
                    .map(|word| format!("{name}: no {word:?} in: {line}")),
            ),
        }
        assert_echo(&client.netns, server.at(9000)).with_context(|| format!("after {name}"))?;
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n\n"));
    ensure!(
        sniffer.seen()?.segments_on(9000).count() == 0,
        "it left in plaintext"
    );
    // The file disappears: the same. It comes back good: taken, and the node has not restarted.
    fs::remove_file(mesh.a.file())?;
    assert_echo(&client.netns, server.at(9000))?;
    mesh.a.replace_file(&good)?;
    assert_echo(&client.netns, server.at(9000))
}

// B113, B106, B107.
#[test]
fn a_bad_setting_is_refused_by_the_name_of_its_variable() -> Result<()> {
    let topology = pods().build()?;
    let good = MeshFile::of(&topology).for_node("a");
    let mut failures = Vec::new();
    for (name, value) in [
        ("CONNECTION_TERMINATION_DEADLINE", "soon"),
        ("SECRET_TTL", "-5m"),
        ("ENABLE_ORIG_SRC", "perhaps"),
        ("ZTUNNEL_WORKER_THREADS", "many"),
        ("HTTP2_FRAME_SIZE", "7"),
        ("LOG_FORMAT", "xml"),
        ("RUST_LOG", "info,=="),
        ("PROXY_MODE", "dedicated"),
        ("LOCAL_XDS", "workloads: []"),
        ("LOCAL_XDS_PATH", ""),
        ("LOCAL_XDS_PATH", "/no/such/file.yaml"),
        ("BPF_PIN_DIR", "/proc/nowhere"),
    ] {
        let settings = Settings::of(&topology)?.env(name, value);
        let says = if value.starts_with('/') {
            vec![value]
        } else {
            vec![name]
        };
        if let Err(error) = refuses(&topology, &good, settings, &says) {
            failures.push(format!("{name}={value}: {error:#}"));
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n\n"));
    Ok(())
}

#[test]
fn settings_that_are_known_and_not_honoured_are_named_at_the_start() -> Result<()> {
    let topology = pods().build()?;
    let good = MeshFile::of(&topology).for_node("a");
    let settings = Settings::of(&topology)?.env("PROXY_WORKLOAD_INFO", "demo/a/a");
    let node = Node::start(&topology, "a", &good, settings)?;
    let named = |line: &str| line.contains("PROXY_WORKLOAD_INFO").then_some(());
    node.log().wait_for("the ignored variable", PATIENCE, named)
}

#[test]
fn a_ca_directory_that_will_not_do_is_refused_with_its_path() -> Result<()> {
    let topology = pods().build()?;
    let good = MeshFile::of(&topology).for_node("a");
    let directory = topology.directory()?;
    let mut failures = Vec::new();
    let mut case = |name: &str, says: &[&str], make: &dyn Fn(&Path) -> Result<()>| -> Result<()> {
        let ca = directory.join(format!("ca-{}", name.replace(' ', "-")));
        make(&ca)?;
        let mut settings = Settings::of(&topology)?;
        settings.ca_directory.clone_from(&ca);
        let path = ca.to_string_lossy();
        let says = [says, &[&*path]].concat();
        if let Err(error) = refuses(&topology, &good, settings, &says) {
            failures.push(format!("{name}: {error:#}"));
        }
        Ok(())
    };
    case("a file in its place", &[], &|ca| Ok(fs::write(ca, "")?))?;
    case("a key that others can read", &["600"], &|ca| {
        pair(ca, "root")?;
        set_mode(&ca.join("root-key.pem"), 0o644)
    })?;
    case("a key of another certificate", &["not the key of"], &|ca| {
        pair(ca, "root")?;
        let other = ca.with_extension("other");
        pair(&other, "root")?;
        fs::copy(other.join("root-key.pem"), ca.join("root-key.pem"))?;
        Ok(())
    })?;
    case("a key without a certificate", &["root-cert.pem"], &|ca| {
        pair(ca, "root")?;
        Ok(fs::remove_file(ca.join("root-cert.pem"))?)
    })?;
    case("a certificate without a key", &["root-key.pem"], &|ca| {
        pair(ca, "root")?;
        Ok(fs::remove_file(ca.join("root-key.pem"))?)
    })?;
    case("no PEM", &["root-cert.pem"], &|ca| {
        pair(ca, "root")?;
        Ok(fs::write(ca.join("root-cert.pem"), "what is this")?)
    })?;
    case("an empty key", &["root-key.pem"], &|ca| {
        pair(ca, "root")?;
        Ok(fs::write(ca.join("root-key.pem"), "")?)
    })?;
    ensure!(failures.is_empty(), "{}", failures.join("\n\n"));
    Ok(())
}

#[test]
fn a_root_that_exists_is_used_as_it_is_whether_ec_or_rsa() -> Result<()> {
    for kind in ["root", "rsa-root"] {
        let topology = pods().build()?;
        let settings = Settings::of(&topology)?;
        pair(&settings.ca_directory, kind)?;
        let key = settings.ca_directory.join("root-key.pem");
        let before = fs::read(&key)?;
        let file = MeshFile::of(&topology);
        let mesh = Mesh::run(topology, |node| file.for_node(node), |_| settings.clone())?;
        let server = mesh.pod("server")?;
        let _app = Server::start(&server.netns, 9000, apps::echo)?;
        assert_echo(&mesh.pod("client")?.netns, server.at(9000))?;
        ensure!(fs::read(&key)? == before, "the key has changed");
    }
    Ok(())
}

#[test]
fn a_root_that_is_made_is_for_nobody_else_to_read() -> Result<()> {
    let topology = pods().build()?;
    let settings = Settings::of(&topology)?;
    let text = MeshFile::of(&topology).for_node("a");
    let _node = Node::start(&topology, "a", &text, settings.clone())?;
    let mode = |name: &str| -> Result<u32> {
        let meta = fs::metadata(settings.ca_directory.join(name))?;
        Ok(meta.permissions().mode() & 0o777)
    };
    assert_eq!(mode("root-key.pem")?, 0o600);
    ensure!(
        mode("root-cert.pem")? & 0o022 == 0,
        "others can write the certificate"
    );
    Ok(())
}

#[test]
fn a_full_disk_leaves_no_half_of_a_root_behind() -> Result<()> {
    let topology = pods().build()?;
    let directory = topology.directory()?;
    let small = directory.join("small");
    fs::create_dir(&small)?;
    let (real, at) = (binary()?, small.display().to_string());
    // In a mount namespace of its own, so that nothing is left mounted.
    let script = format!(
        "exec unshare --mount sh -c '\
         mount -t tmpfs -o size=4k tmpfs {at} && head -c 4096 /dev/zero > {at}/full 2>/dev/null; \
         {} \"$@\"; status=$?; echo \"left: $(find {at} -name \"*.pem*\" | wc -l)\"; exit $status' sh \"$@\"",
        real.display()
    );
    let mut settings = Settings::of(&topology)?;
    settings.binary = wrapper(&directory, "on-a-full-disk", &script)?;
    settings.ca_directory = small.join("ca");
    let good = MeshFile::of(&topology).for_node("a");
    refuses(
        &topology,
        &good,
        settings,
        &["no space left", "ca", "left: 0"],
    )
}

#[test]
fn a_capability_that_is_missing_is_named_with_its_use() -> Result<()> {
    let topology = pods().build()?;
    let directory = topology.directory()?;
    let good = MeshFile::of(&topology).for_node("a");
    let real = binary()?;
    let mut failures = Vec::new();
    for (name, options) in [
        (
            "CAP_NET_ADMIN",
            "--bounding-set=-net_admin --inh-caps=-net_admin",
        ),
        (
            "CAP_SYS_ADMIN",
            "--bounding-set=-sys_admin --inh-caps=-sys_admin",
        ),
        (
            "CAP_",
            "--reuid=nobody --regid=nogroup --clear-groups --inh-caps=-all",
        ),
    ] {
        let script = format!(
            "exec setpriv {options} {} \"$@\"",
            readable(&directory, &real)?
        );
        let mut settings = Settings::of(&topology)?;
        settings.binary = wrapper(&directory, &format!("without-{name}"), &script)?;
        if let Err(error) = refuses(&topology, &good, settings, &[name]) {
            failures.push(format!("{name}: {error:#}"));
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n\n"));
    Ok(())
}

#[test]
fn a_port_that_is_taken_is_named() -> Result<()> {
    let topology = pods().build()?;
    let good = MeshFile::of(&topology).for_node("a");
    for port in [15020, 15021] {
        let taken = Server::start(&topology.node("a")?.netns, port, apps::echo)?;
        let settings = Settings::of(&topology)?;
        refuses(&topology, &good, settings, &[&port.to_string()])
            .with_context(|| format!("port {port}"))?;
        drop(taken);
    }
    Ok(())
}

#[test]
fn probes_and_scrapes_are_answered_also_where_ipv6_sockets_are_for_ipv6_alone() -> Result<()> {
    let topology = pods().build()?;
    let good = MeshFile::of(&topology).for_node("a");
    let net = &topology.node("a")?.netns;
    net.sysctl("ipv6/bindv6only", "1")?;
    let settings = Settings::of(&topology)?.env("ISTIO_META_ISTIO_VERSION", "1.29.1");
    // It is ready, and so answers on 127.0.0.1.
    let node = Node::start(&topology, "a", &good, settings)?;
    let build = [("component", "ztunnel"), ("tag", "1.29.1")];
    ensure!(node.metrics()?.sum("istio_build", &build) > 0.5);
    for port in [15020, 15021] {
        drop(apps::dial(
            net,
            (std::net::Ipv6Addr::LOCALHOST, port).into(),
        )?);
    }
    Ok(())
}

#[test]
fn a_word_that_it_does_not_know_is_refused() -> Result<()> {
    let out = Command::new(binary()?).arg("dance").env_clear().output()?;
    ensure!(!out.status.success(), "{}", out.status);
    ensure!(String::from_utf8_lossy(&out.stderr).contains("dance"));
    ensure!(WATCH < PATIENCE);
    Ok(())
}

/// A copy that an ordinary user may run.
fn readable(directory: &Path, binary: &Path) -> Result<String> {
    let copy = directory.join("ztunnel");
    if !copy.exists() {
        fs::copy(binary, &copy)?;
        set_mode(&copy, 0o755)?;
        set_mode(directory, 0o755)?;
    }
    Ok(copy.display().to_string())
}

/// A root certificate and its key, made by openssl.
fn pair(ca: &Path, kind: &str) -> Result<()> {
    fs::create_dir_all(ca)?;
    set_mode(ca, 0o700)?;
    let (key, certificate) = (ca.join("root-key.pem"), ca.join("root-cert.pem"));
    let (key_path, certificate) = (key.to_string_lossy(), certificate.to_string_lossy());
    let curve = ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
    let algorithm = if kind.starts_with("rsa") {
        &["rsa:2048"][..]
    } else {
        &curve
    };
    let mut args = vec![
        "req",
        "-x509",
        "-nodes",
        "-days",
        "30",
        "-subj",
        "/O=cluster.local",
        "-newkey",
    ];
    args.extend(algorithm);
    args.extend(["-addext", "keyUsage=critical,keyCertSign,cRLSign"]);
    args.extend(["-keyout", &key_path, "-out", &certificate]);
    output(None, "openssl", &args, "")?;
    set_mode(&key, 0o600)
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("chmod {}", path.display()))
}

/// A few lines that would fill the memory if they were followed.
fn bomb() -> String {
    let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for level in 1..12 {
        let before = level - 1;
        let many = vec![format!("*a{before}"); 9].join(", ");
        text.push_str(&format!("a{level}: &a{level} [{many}]\n"));
    }
    text
}
