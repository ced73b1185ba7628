//! A real control plane without a cluster: etcd, kube-apiserver and istiod as processes in a node's namespace, and the
//! objects that a kubelet would write. Takes a topology; gives what a node process needs to join; never pretends to be
//! one of the three.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    netns::Netns,
    process::{Running, finish, output},
    topology::{POD_NAMESPACE, Pod, Topology},
    wait,
};

/// A running control plane.
#[derive(Debug)]
pub struct Cluster {
    // Before what it talks to.
    istiod: Option<Running>,
    _apiserver: Running,
    _etcd: Running,
    netns: Netns,
    address: String,
    directory: PathBuf,
    tools: PathBuf,
}

impl Cluster {
    /// Starts all three in a node's namespace, with the mesh's resource definitions, and waits until they serve.
    pub fn start(topology: &Topology, node: &str) -> Result<Self> {
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
            _apiserver: apiserver,
            _etcd: etcd,
            netns,
            address,
            directory,
            tools,
        };
        cluster.prepare()?;
        cluster.start_istiod(&[])?;
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
        let mut objects = String::new();
        for namespace in [SYSTEM, POD_NAMESPACE] {
            writeln!(
                objects,
                "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}}}"
            )?;
        }
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
    pub fn apply_pod(&self, yaml: &str) -> Result<()> {
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

    /// Nodes, accounts and pods of the topology, the node proxies' included.
    pub fn populate(&self, topology: &Topology) -> Result<()> {
        let mut objects = String::new();
        for node in topology.nodes() {
            let (name, zone) = (&node.name, &node.name);
            writeln!(
                objects,
                "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}, labels: \
                 {{topology.kubernetes.io/region: r1, topology.kubernetes.io/zone: zone-{zone}}}}}"
            )?;
        }
        for pod in topology.pods() {
            objects.push_str(&service_account(&pod.namespace, &pod.service_account));
        }
        self.apply(&objects)?;
        let mut pods = String::new();
        for node in topology.nodes() {
            let name = proxy_of(&node.name);
            let ips = [node.v4.to_string()];
            pods.push_str(&pod_object(
                &name,
                SYSTEM,
                &node.name,
                "ztunnel",
                &ips,
                "app: ztunnel",
                "",
            ));
        }
        for pod in topology.pods() {
            pods.push_str(&pod_of(pod));
        }
        self.apply_pod(&pods)
    }

    /// What the node process of this node is told; writes its token and the mesh's root.
    pub fn environment(&self, topology: &Topology, node: &str) -> Result<Vec<(String, String)>> {
        let proxy = proxy_of(node);
        let token = self.kubectl(
            &[
                "-n",
                SYSTEM,
                "create",
                "token",
                "ztunnel",
                "--audience",
                "istio-ca",
                "--bound-object-kind",
                "Pod",
                "--bound-object-name",
                &proxy,
            ],
            "",
        )?;
        let token_file = self.directory.join(format!("{node}.token"));
        let root_file = self.directory.join("root-cert.pem");
        fs::write(&token_file, token.trim())?;
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

/// A pod of the topology as an object, enrolled and ready.
#[must_use]
pub fn pod_of(pod: &Pod) -> String {
    let ips = [pod.v4.to_string(), pod.v6.to_string()];
    let labels = format!("app: {}", pod.name);
    pod_object(
        &pod.name,
        &pod.namespace,
        &pod.node,
        &pod.service_account,
        &ips,
        &labels,
        "ambient.istio.io/redirection: enabled",
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
const PATIENCE: Duration = Duration::from_secs(60);
