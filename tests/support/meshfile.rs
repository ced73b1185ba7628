//! The file that tells a node process about the mesh. Takes a topology, who is enrolled, services
//! and policies; gives YAML text; never decides what a correct file is: policies and extra text go
//! in as they are given.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::topology::{Pod, Topology};

/// A mesh in the making. Every pod of the topology is a workload; those that are enrolled speak
/// HBONE and are listed under `pods` on their own node.
#[derive(Clone, Debug)]
pub struct MeshFile {
    pods: Vec<Pod>,
    enrolled: BTreeSet<String>,
    speaks_hbone: BTreeSet<String>,
    unlisted: bool,
    services: Vec<Service>,
    members: BTreeMap<String, Vec<Membership>>,
    attached: BTreeMap<String, Vec<String>>,
    pod_settings: BTreeMap<String, String>,
    workload_settings: BTreeMap<String, String>,
    policies: Vec<String>,
    verbatim: String,
}

#[derive(Clone, Debug)]
struct Membership {
    host: String,
    ports: Vec<(u16, u16)>,
}

#[derive(Clone, Debug)]
struct Service {
    name: String,
    namespace: String,
    vips: Vec<IpAddr>,
    ports: Vec<(u16, u16)>,
    settings: String,
}

impl MeshFile {
    /// Every pod enrolled, no service, no policy.
    #[must_use]
    pub fn of(topology: &Topology) -> Self {
        Self {
            pods: topology.pods().to_vec(),
            enrolled: topology.pods().iter().map(|pod| pod.name.clone()).collect(),
            speaks_hbone: BTreeSet::new(),
            unlisted: false,
            services: Vec::new(),
            members: BTreeMap::new(),
            attached: BTreeMap::new(),
            pod_settings: BTreeMap::new(),
            workload_settings: BTreeMap::new(),
            policies: Vec::new(),
            verbatim: String::new(),
        }
    }

    /// This pod stays outside: a workload in plain TCP.
    #[must_use]
    pub fn without(mut self, pod: &str) -> Self {
        self.enrolled.remove(pod);
        self
    }

    /// This pod brings its own HBONE, as a gateway does: nobody captures it.
    #[must_use]
    pub fn with_own_hbone(mut self, pod: &str) -> Self {
        self.enrolled.remove(pod);
        self.speaks_hbone.insert(pod.to_owned());
        self
    }

    /// The file lists no pod: a node agent says which are enrolled.
    #[must_use]
    pub fn unlisted(mut self) -> Self {
        self.unlisted = true;
        self
    }

    /// A service with these pods behind it; ports are (service port, target port).
    #[must_use]
    pub fn service(
        mut self,
        name: &str,
        vips: &[IpAddr],
        ports: &[(u16, u16)],
        pods: &[&str],
    ) -> Self {
        let namespace = self
            .pods
            .first()
            .map(|pod| pod.namespace.clone())
            .unwrap_or_default();
        for pod in pods {
            self.members
                .entry((*pod).to_owned())
                .or_default()
                .push(Membership {
                    host: host_name(&namespace, name),
                    ports: ports.to_vec(),
                });
        }
        self.services.push(Service {
            name: name.to_owned(),
            namespace,
            vips: vips.to_vec(),
            ports: ports.to_vec(),
            settings: String::new(),
        });
        self
    }

    /// Text such as `canonical: true` for the item of a service that was added before.
    #[must_use]
    pub fn service_setting(mut self, name: &str, yaml: &str) -> Self {
        let mut services = self.services.iter_mut();
        if let Some(service) = services.find(|service| service.name == name) {
            service.settings = format!("{}{yaml}\n", service.settings);
        }
        self
    }

    /// Text such as `network: far` for the pod's item under `workloads`.
    #[must_use]
    pub fn workload_setting(mut self, pod: &str, yaml: &str) -> Self {
        let settings = self.workload_settings.entry(pod.to_owned()).or_default();
        *settings = format!("{settings}{yaml}\n");
        self
    }

    /// A policy: the YAML of one list item under `policies`, without its dash.
    #[must_use]
    pub fn policy(mut self, yaml: &str) -> Self {
        self.policies.push(yaml.to_owned());
        self
    }

    /// This pod names this policy (`namespace/name`) in `authorizationPolicies`.
    #[must_use]
    pub fn attach(mut self, pod: &str, policy: &str) -> Self {
        self.attached
            .entry(pod.to_owned())
            .or_default()
            .push(policy.to_owned());
        self
    }

    /// Text such as `excludeOutboundPorts: [25]` for the pod's item under `pods`.
    #[must_use]
    pub fn pod_setting(mut self, pod: &str, yaml: &str) -> Self {
        self.pod_settings.insert(pod.to_owned(), yaml.to_owned());
        self
    }

    /// Text that is added at the end as it is: for files that are meant to be wrong.
    #[must_use]
    pub fn verbatim(mut self, yaml: &str) -> Self {
        self.verbatim.push_str(yaml);
        self
    }

    /// The file for one node.
    #[must_use]
    pub fn for_node(&self, node: &str) -> String {
        let mut text = String::from("workloads:\n");
        for pod in &self.pods {
            text.push_str(&self.workload(pod));
        }
        if !self.services.is_empty() {
            text.push_str("services:\n");
            self.services
                .iter()
                .for_each(|service| text.push_str(&service.yaml()));
        }
        if !self.policies.is_empty() {
            text.push_str("policies:\n");
            self.policies
                .iter()
                .for_each(|policy| text.push_str(&list_item(policy)));
        }
        text.push_str(&self.pods_of(node));
        text.push_str(&self.verbatim);
        text
    }

    /// The part of the file that lists the pods of one node: for a node that hears of everything else elsewhere.
    #[must_use]
    pub fn pods_of(&self, node: &str) -> String {
        let mut text = String::from("pods:\n");
        let ours =
            |pod: &&Pod| !self.unlisted && pod.node == node && self.enrolled.contains(&pod.name);
        if !self.pods.iter().any(|pod| ours(&pod)) {
            text.truncate(text.len() - 1);
            text.push_str(" []\n");
        }
        for pod in self.pods.iter().filter(ours) {
            let mut item = format!(
                "name: {}\nnamespace: {}\nserviceAccount: {}\nnetns: {}\n",
                pod.name,
                pod.namespace,
                pod.service_account,
                pod.netns.path().display(),
            );
            item.extend(self.pod_settings.get(&pod.name).map(String::as_str));
            text.push_str(&list_item(&item));
        }
        text
    }

    fn workload(&self, pod: &Pod) -> String {
        let Pod {
            name,
            namespace,
            service_account,
            node,
            ..
        } = pod;
        let protocol = if self.enrolled.contains(name) || self.speaks_hbone.contains(name) {
            "HBONE"
        } else {
            "TCP"
        };
        let mut item = format!(
            "uid: demo//Pod/{namespace}/{name}\n\
             name: {name}\n\
             namespace: {namespace}\n\
             serviceAccount: {service_account}\n\
             workloadName: {name}\n\
             canonicalName: {name}\n\
             canonicalRevision: v1\n\
             clusterId: demo\n\
             trustDomain: cluster.local\n\
             workloadIps: [\"{}\", \"{}\"]\n\
             protocol: {protocol}\n\
             node: {node}\n",
            pod.v4, pod.v6,
        );
        if let Some(policies) = self.attached.get(name) {
            item.push_str(&format!("authorizationPolicies: [{}]\n", quoted(policies)));
        }
        item.extend(self.workload_settings.get(name).map(String::as_str));
        match self.members.get(name) {
            None => item.push_str("services: {}\n"),
            Some(members) => {
                item.push_str("services:\n");
                for Membership { host, ports } in members {
                    item.push_str(&format!("  \"{namespace}/{host}\": {}\n", port_map(ports)));
                }
            }
        }
        list_item(&item)
    }
}

impl Service {
    fn yaml(&self) -> String {
        let vips: Vec<_> = self.vips.iter().map(|vip| format!("/{vip}")).collect();
        list_item(&format!(
            "name: {}\nnamespace: {}\nhostname: {}\nvips: [{}]\nports: {}\n{}",
            self.name,
            self.namespace,
            host_name(&self.namespace, &self.name),
            quoted(&vips),
            port_map(&self.ports),
            self.settings,
        ))
    }
}

/// An ALLOW policy with workload scope that admits these service accounts, all of the namespace of
/// the demo's pods.
#[must_use]
pub fn allow_accounts(name: &str, accounts: &[&str]) -> String {
    let namespace = crate::topology::POD_NAMESPACE;
    let mut text = format!(
        "name: {name}\nnamespace: {namespace}\nscope: WorkloadSelector\naction: Allow\n\
         dryRun: false\nrules:\n- - - serviceAccounts:\n"
    );
    for account in accounts {
        text.push_str(&format!(
            "      - {{namespace: {namespace}, serviceAccount: {account}}}\n"
        ));
    }
    text
}

fn host_name(namespace: &str, service: &str) -> String {
    format!("{service}.{namespace}.svc.cluster.local")
}

fn port_map(ports: &[(u16, u16)]) -> String {
    let entries: Vec<_> = ports
        .iter()
        .map(|(from, to)| format!("{from}: {to}"))
        .collect();
    format!("{{{}}}", entries.join(", "))
}

fn quoted(words: &[String]) -> String {
    let words: Vec<_> = words.iter().map(|word| format!("\"{word}\"")).collect();
    words.join(", ")
}

/// Indents `yaml` as one item of a list.
fn list_item(yaml: &str) -> String {
    let mut text = String::new();
    for (line, number) in yaml.lines().zip(0..) {
        text.push_str(if number == 0 { "  - " } else { "    " });
        text.push_str(line);
        text.push('\n');
    }
    text
}
