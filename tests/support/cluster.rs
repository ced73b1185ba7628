//! A real control plane without a cluster: etcd, kube-apiserver and istiod as processes in a node's namespace, and the
//! objects that a kubelet would write. Takes a topology; gives what a node process needs to join; never pretends to be
//! one of the three.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use crate::{
    netns::Netns,
    process::{Running, finish, output},
    topology::{Pod, Topology},
    wait,
};

/// A running control plane.
#[derive(Debug)]
pub struct Cluster {
    // Before what it talks to.
    istiod: Option<Running>,
    apiserver: Running,
    _etcd: Running,
    netns: Netns,
    address: String,
    directory: PathBuf,
    tools: PathBuf,
}

impl Cluster {
    /// Starts all three in a node's namespace, istiod with these arguments, and the mesh's resource definitions; waits
    /// until they serve.
    pub fn start(topology: &Topology, node: &str, istiod: &[&str]) -> Result<Self> {
        let tools = tools()?;
        let net = topology.node(node)?;
        let (netns, address) = (net.netns.clone(), net.v4.to_string());
        let directory = topology.directory()?.join("cluster");
        fs::create_dir_all(&directory)?;
        let key = directory.join("sa.key").display().to_string();
        let public = directory.join("sa.pub").display().to_string();
        output(None, "openssl", &["genrsa", "-out", &key, "2048"], "")?;
        output(
            None,
            "openssl",
            &["rsa", "-in", &key, "-pubout", "-out", &public],
            "",
        )?;
        fs::write(
            directory.join("tokens.csv"),
            "admin,admin,admin,\"system:masters\"\n",
        )?;
        fs::write(
            directory.join("mesh.yaml"),
            format!("trustDomain: cluster.local\nrootNamespace: {SYSTEM}\n"),
        )?;
        let etcd = start_etcd(&tools, &directory, &netns)?;
        let apiserver = start_apiserver(&tools, &directory, &netns, &address)?;
        let mut cluster = Self {
            istiod: None,
            apiserver,
            _etcd: etcd,
            netns,
            address,
            directory,
            tools,
        };
        cluster.prepare()?;
        cluster.start_istiod(istiod)?;
        Ok(cluster)
    }

    fn prepare(&self) -> Result<()> {
        let certificate = self.directory.join("apiserver/apiserver.crt");
        fs::write(
            self.directory.join("kubeconfig"),
            format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: x\n\
                 clusters: [{{name: c, cluster: {{server: \"https://127.0.0.1:6443\", certificate-authority: {}}}}}]\n\
                 users: [{{name: u, user: {{token: admin}}}}]\n\
                 contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\n",
                certificate.display()
            ),
        )?;
        wait::until("the API server", PATIENCE, || {
            self.kubectl(&["get", "--raw", "/readyz"], "").ok()
        })?;
        let crds = self.tools.join("crds").display().to_string();
        self.kubectl(&["apply", "--server-side", "-f", &crds], "")?;
        let mut objects = namespace(SYSTEM);
        for account in ["istiod", "ztunnel"] {
            objects.push_str(&service_account(SYSTEM, account));
        }
        self.apply(&objects)
    }

    /// Starts istiod, which must not run, and waits until it serves.
    pub fn start_istiod(&mut self, arguments: &[&str]) -> Result<()> {
        ensure!(self.istiod.is_none(), "istiod runs");
        let mut command = Command::new(self.tools.join("pilot-discovery"));
        command.current_dir(&self.directory).env_clear();
        command
            .env("HOME", &self.directory)
            .env("PATH", "/usr/bin:/bin");
        for (name, value) in [
            ("PILOT_ENABLE_AMBIENT", "true"),
            ("CA_TRUSTED_NODE_ACCOUNTS", "istio-system/ztunnel"),
            ("CLUSTER_ID", CLUSTER_ID),
            ("POD_NAME", "istiod-1"),
            ("POD_NAMESPACE", SYSTEM),
            ("SERVICE_ACCOUNT", "istiod"),
            ("REVISION", "default"),
            ("PILOT_CERT_PROVIDER", "istiod"),
            ("PILOT_ENABLE_GATEWAY_API_DEPLOYMENT_CONTROLLER", "false"),
            ("PILOT_ENABLE_GATEWAY_API_STATUS", "false"),
        ] {
            command.env(name, value);
        }
        command.args([
            "discovery",
            "--kubeconfig",
            "kubeconfig",
            "--meshConfig",
            "mesh.yaml",
        ]);
        command.args(arguments);
        let log = self.directory.join("istiod.log");
        let running = Running::start_with_file("istiod", Some(&self.netns), command, &log)?;
        self.istiod = Some(running);
        let at = ([127, 0, 0, 1], 8080).into();
        wait::until("istiod", PATIENCE, || {
            let ready = crate::http::get(&self.netns, at, "/ready").ok()?;
            (ready.status == 200).then_some(())
        })
        .with_context(|| format!("see {}", log.display()))?;
        wait::until("the mesh's root", PATIENCE, || {
            self.root().ok().filter(|pem| !pem.is_empty())
        })
        .map(drop)
    }

    /// Kills istiod, as a node's failure would.
    pub fn kill_istiod(&mut self) -> Result<()> {
        match self.istiod.take() {
            Some(mut running) => running.kill().map(drop),
            None => Ok(()),
        }
    }

    /// Asks istiod to leave, as a rollout does, and waits until it has.
    pub fn stop_istiod(&mut self) -> Result<()> {
        match self.istiod.take() {
            Some(mut running) => {
                running.signal(Signal::SIGTERM)?;
                running.wait_exit(PATIENCE).map(drop)
            }
            None => Ok(()),
        }
    }

    /// The API server answers nobody until [`Cluster::thaw_apiserver`].
    pub fn freeze_apiserver(&self) -> Result<()> {
        self.apiserver.signal(Signal::SIGSTOP)
    }

    pub fn thaw_apiserver(&self) -> Result<()> {
        self.apiserver.signal(Signal::SIGCONT)
    }

    /// What `istio-ca-root-cert` holds.
    fn root(&self) -> Result<String> {
        let path = "jsonpath={.data.root-cert\\.pem}";
        self.kubectl(
            &[
                "-n",
                SYSTEM,
                "get",
                "configmap",
                "istio-ca-root-cert",
                "-o",
                path,
            ],
            "",
        )
    }

    /// Writes objects.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        self.kubectl(
            &["apply", "--server-side", "--force-conflicts", "-f", "-"],
            yaml,
        )
        .map(drop)
    }

    /// Writes a pod as its kubelet would: the object, then its status.
    fn apply_pod(&self, yaml: &str) -> Result<()> {
        self.apply(yaml)?;
        let args = [
            "apply",
            "--server-side",
            "--force-conflicts",
            "--subresource=status",
            "-f",
            "-",
        ];
        self.kubectl(&args, yaml).map(drop)
    }

    /// Runs kubectl.
    pub fn kubectl(&self, args: &[&str], input: &str) -> Result<String> {
        let program = self.tools.join("kubectl").display().to_string();
        let kubeconfig = self.directory.join("kubeconfig").display().to_string();
        let cache = self.directory.join("kubectl-cache").display().to_string();
        let mut all = vec!["--kubeconfig", &kubeconfig, "--cache-dir", &cache];
        all.extend(args);
        output(Some(&self.netns), &program, &all, input)
    }

    /// Runs istioctl in a node's namespace.
    pub fn istioctl(&self, netns: &Netns, args: &[&str]) -> Result<String> {
        let mut command = Command::new(self.tools.join("istioctl"));
        command.args(args).env("HOME", &self.directory);
        finish(Some(netns), &mut command)
    }

    /// The topology's nodes, and the pod of each node's proxy.
    pub fn populate(&self, topology: &Topology) -> Result<()> {
        let (mut nodes, mut proxies) = (String::new(), String::new());
        for node in topology.nodes() {
            let (name, zone) = (&node.name, &node.name);
            writeln!(
                nodes,
                "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}, labels: \
                 {{topology.kubernetes.io/region: r1, topology.kubernetes.io/zone: zone-{zone}}}}}"
            )?;
            proxies.push_str(&pod_object(
                &proxy_of(&node.name),
                SYSTEM,
                &node.name,
                "ztunnel",
                &[node.v4.to_string()],
                "app: ztunnel",
                "",
            ));
        }
        self.apply(&nodes)?;
        self.apply_pod(&proxies)
    }

    /// Pods with their namespaces and accounts, running and ready.
    pub fn add(&self, pods: &[(&Pod, Enrolled)]) -> Result<()> {
        let (mut namespaces, mut accounts) = (BTreeSet::new(), String::new());
        let mut objects = String::new();
        for (pod, enrolled) in pods {
            namespaces.insert(namespace(&pod.namespace));
            accounts.push_str(&service_account(&pod.namespace, &pod.service_account));
            objects.push_str(&pod_of(pod, *enrolled));
        }
        let around: String = namespaces.into_iter().chain([accounts]).collect();
        self.apply(&around)?;
        self.apply_pod(&objects)
    }

    /// A token of this node's proxy for an audience; `istio-ca` is the one that istiod accepts.
    pub fn token(&self, node: &str, audience: &str) -> Result<String> {
        let (audience, pod) = (format!("--audience={audience}"), proxy_of(node));
        let bound = format!("--bound-object-name={pod}");
        let mut args = vec!["-n", SYSTEM, "create", "token", "ztunnel", &audience];
        args.extend(["--bound-object-kind=Pod", &bound]);
        let token = self.kubectl(&args, "")?;
        Ok(token.trim().to_owned())
    }

    /// The same token as the API server would have signed it a day earlier: it has expired.
    pub fn expired(&self, token: &str) -> Result<String> {
        let mut parts = token.split('.');
        let (head, claims) = parts.next().zip(parts.next()).context("no token")?;
        let padding = "=".repeat((4 - claims.len() % 4) % 4);
        let decode = ["-d", "--base64url"];
        let claims = output(None, "basenc", &decode, &format!("{claims}{padding}"))?;
        let mut claims: serde_json::Value = serde_json::from_str(&claims)?;
        for claim in ["iat", "nbf", "exp"] {
            let time = claims.get_mut(claim).context("a claim")?;
            *time = (time.as_i64().context("a time")? - DAY_SECONDS).into();
        }
        let encode = ["-w0", "--base64url"];
        let claims = output(None, "basenc", &encode, &claims.to_string())?;
        let signed = format!("{head}.{}", claims.trim_end_matches('='));
        let signature = self.directory.join("signature").display().to_string();
        let key = self.directory.join("sa.key").display().to_string();
        let sign = ["dgst", "-sha256", "-sign", &key, "-out", &signature];
        output(None, "openssl", &sign, &signed)?;
        let signature = output(None, "basenc", &["-w0", "--base64url", &signature], "")?;
        Ok(format!("{signed}.{}", signature.trim_end_matches('=')))
    }

    /// Gives the process of a node another token, as a kubelet does: the file is replaced.
    pub fn replace_token(&self, node: &str, token: &str) -> Result<()> {
        let file = self.token_file(node);
        let new = file.with_extension("new");
        fs::write(&new, token)?;
        fs::rename(&new, &file).with_context(|| format!("replace {}", file.display()))
    }

    fn token_file(&self, node: &str) -> PathBuf {
        self.directory.join(format!("{node}.token"))
    }

    /// What the node process of this node is told; writes its token and the mesh's root.
    pub fn environment(&self, topology: &Topology, node: &str) -> Result<Vec<(String, String)>> {
        let proxy = proxy_of(node);
        self.replace_token(node, &self.token(node, "istio-ca")?)?;
        let token_file = self.token_file(node);
        let root_file = self.directory.join("root-cert.pem");
        fs::write(&root_file, self.root()?)?;
        let address = format!("https://{}:15012", self.address);
        let (token, root) = (
            token_file.display().to_string(),
            root_file.display().to_string(),
        );
        Ok([
            ("XDS_ADDRESS", address.clone()),
            ("CA_ADDRESS", address),
            ("XDS_ROOT_CA", root.clone()),
            ("CA_ROOT_CA", root),
            // istiod's certificate names its service, not an address.
            ("ALT_XDS_HOSTNAME", SERVICE.to_owned()),
            ("ALT_CA_HOSTNAME", SERVICE.to_owned()),
            ("AUTH_TOKEN", token),
            ("ISTIO_META_CLUSTER_ID", CLUSTER_ID.to_owned()),
            ("POD_NAME", proxy),
            ("POD_NAMESPACE", SYSTEM.to_owned()),
            ("SERVICE_ACCOUNT", "ztunnel".to_owned()),
            ("INSTANCE_IP", topology.node(node)?.v4.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into())
    }
}

fn start_etcd(tools: &Path, directory: &Path, netns: &Netns) -> Result<Running> {
    let mut command = Command::new(tools.join("etcd"));
    let (client, peer) = ("http://127.0.0.1:2379", "http://127.0.0.1:2380");
    command.current_dir(directory).args([
        "--data-dir=etcd",
        "--log-level=error",
        "--unsafe-no-fsync",
        &format!("--listen-client-urls={client}"),
        &format!("--advertise-client-urls={client}"),
        &format!("--listen-peer-urls={peer}"),
        &format!("--initial-advertise-peer-urls={peer}"),
        &format!("--initial-cluster=default={peer}"),
    ]);
    Running::start_with_file("etcd", Some(netns), command, &directory.join("etcd.log"))
}

fn start_apiserver(
    tools: &Path,
    directory: &Path,
    netns: &Netns,
    address: &str,
) -> Result<Running> {
    let mut command = Command::new(tools.join("kube-apiserver"));
    command.current_dir(directory).args([
        "--etcd-servers=http://127.0.0.1:2379",
        "--endpoint-reconciler-type=none",
        "--service-account-issuer=https://kubernetes.default.svc",
        "--service-account-key-file=sa.pub",
        "--service-account-signing-key-file=sa.key",
        "--token-auth-file=tokens.csv",
        "--cert-dir=apiserver",
        "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition",
        "--authorization-mode=RBAC",
        "--bind-address=127.0.0.1",
        &format!("--advertise-address={address}"),
        "--service-cluster-ip-range=10.96.0.0/16",
    ]);
    let log = directory.join("apiserver.log");
    Running::start_with_file("kube-apiserver", Some(netns), command, &log)
}

/// Whether a node agent has enrolled a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enrolled {
    Yes,
    No,
}

/// A pod as an object, running and ready.
fn pod_of(pod: &Pod, enrolled: Enrolled) -> String {
    let ips = [pod.v4.to_string(), pod.v6.to_string()];
    let labels = format!("app: {}", pod.name);
    let annotation = match enrolled {
        Enrolled::Yes => "ambient.istio.io/redirection: enabled",
        Enrolled::No => "",
    };
    pod_object(
        &pod.name,
        &pod.namespace,
        &pod.node,
        &pod.service_account,
        &ips,
        &labels,
        annotation,
    )
}

#[expect(
    clippy::too_many_arguments,
    reason = "the fields of an object, each once"
)]
fn pod_object(
    name: &str,
    namespace: &str,
    node: &str,
    account: &str,
    ips: &[String],
    labels: &str,
    annotations: &str,
) -> String {
    let list: Vec<_> = ips.iter().map(|ip| format!("{{ip: \"{ip}\"}}")).collect();
    let first = ips.first().map_or("", String::as_str);
    format!(
        "---\napiVersion: v1\nkind: Pod\n\
         metadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}, annotations: {{{annotations}}}}}\n\
         spec: {{nodeName: {node}, serviceAccountName: {account}, containers: [{{name: c, image: x}}]}}\n\
         status: {{phase: Running, podIP: \"{first}\", podIPs: [{}], \
         conditions: [{{type: Ready, status: \"True\"}}]}}\n",
        list.join(", ")
    )
}

fn namespace(name: &str) -> String {
    format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n")
}

fn service_account(namespace: &str, name: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: {namespace}}}\n"
    )
}

fn proxy_of(node: &str) -> String {
    format!("ztunnel-{node}")
}

/// Where `cargo xtask setup --with controlplane` put the programs.
fn tools() -> Result<PathBuf> {
    let found = match std::env::var_os("ZTUNNEL_CONTROLPLANE") {
        Some(path) => Some(PathBuf::from(path)),
        // `<target>/debug/deps/<test>`.
        None => std::env::current_exe()?
            .ancestors()
            .nth(3)
            .map(|target| target.join("controlplane")),
    };
    let found = found.filter(|dir| dir.join("pilot-discovery").is_file());
    found.context("no istiod beside this program: cargo xtask setup --with controlplane")
}

const SYSTEM: &str = "istio-system";
const CLUSTER_ID: &str = "Kubernetes";
const SERVICE: &str = "istiod.istio-system.svc";
const DAY_SECONDS: i64 = 24 * 60 * 60;
/// Programs of this size start slowly on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(120);
