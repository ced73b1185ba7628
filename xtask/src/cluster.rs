//! Builds the real control plane for the tests that want one: takes the Go modules in `tests/controlplane`, gives
//! programs and resource definitions in the target directory; builds nothing that is there already.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::house::House;
use crate::process;

/// Builds what is missing or of other versions, saying what it does.
pub(crate) fn build(house: &House) -> Result<()> {
    let out = house.target.join("controlplane");
    fs::create_dir_all(&out)?;
    for module in &MODULES {
        let source = house.root.join("tests/controlplane").join(module.directory);
        let versions = read(&source.join("go.mod"))? + &read(&source.join("go.sum"))?;
        let stamp = out.join(format!("{}.versions", module.directory));
        let programs: Vec<PathBuf> = module.programs.iter().map(|p| out.join(p.name)).collect();
        let is_there = programs.iter().all(|program| program.is_file());
        if is_there && fs::read_to_string(&stamp).is_ok_and(|held| held == versions) {
            continue;
        }
        for program in module.programs {
            let began = Instant::now();
            println!("setup: building {} ({})", program.name, program.takes);
            let mut go = go(&source);
            go.args(["build", "-mod=readonly", "-ldflags", module.flags, "-o"])
                .arg(out.join(program.name))
                .arg(program.package);
            process::must(go, LIMIT)?;
            println!(
                "setup: {} built, {:.0} s",
                program.name,
                began.elapsed().as_secs_f32()
            );
        }
        fs::write(stamp, versions)?;
    }
    definitions(house, &out.join("crds"))
}

/// The resource definitions that come with the modules.
fn definitions(house: &House, out: &Path) -> Result<()> {
    if out.is_dir() {
        return Ok(());
    }
    let source = house.root.join("tests/controlplane/istio");
    let istio =
        folder(&source, "istio.io/istio")?.join("manifests/charts/base/files/crd-all.gen.yaml");
    let gateway = folder(&source, "sigs.k8s.io/gateway-api")?.join("config/crd/standard");
    let fresh = out.with_extension("new");
    if fresh.is_dir() {
        fs::remove_dir_all(&fresh)?;
    }
    fs::create_dir_all(&fresh)?;
    fs::write(fresh.join("istio.yaml"), read(&istio)?)?;
    for entry in fs::read_dir(&gateway).with_context(|| gateway.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().context("a file has a name")?;
        fs::write(fresh.join(name), read(&path)?)?;
    }
    fs::rename(&fresh, out).context("the definitions")
}

fn folder(source: &Path, module: &str) -> Result<PathBuf> {
    let mut go = go(source);
    go.args(["list", "-m", "-f", "{{.Dir}}", module]);
    Ok(PathBuf::from(process::capture(go)?.trim()))
}

fn go(source: &Path) -> Command {
    let mut go = Command::new("go");
    // A checkout of ours says nothing about the versions of these programs; an older Go fetches the one it needs.
    go.current_dir(source)
        .env("GOFLAGS", "-buildvcs=false")
        .env("GOTOOLCHAIN", "auto")
        .env("PATH", crate::house::search_path());
    go
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

struct Module {
    directory: &'static str,
    flags: &'static str,
    programs: &'static [Program],
}

struct Program {
    name: &'static str,
    package: &'static str,
    takes: &'static str,
}

const MODULES: [Module; 2] = [
    Module {
        directory: "kube",
        // Without it, the API server calls itself v0.0.0.
        flags: "-s -w -X k8s.io/component-base/version.gitVersion=v1.36.3 \
                -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36",
        programs: &[
            Program {
                name: "kube-apiserver",
                package: "k8s.io/kubernetes/cmd/kube-apiserver",
                takes: "five minutes on two cores, once",
            },
            Program {
                name: "kubectl",
                package: "k8s.io/kubernetes/cmd/kubectl",
                takes: "half a minute",
            },
            Program {
                name: "etcd",
                package: "go.etcd.io/etcd/server/v3",
                takes: "seconds",
            },
        ],
    },
    Module {
        directory: "istio",
        flags: "-s -w",
        programs: &[
            Program {
                name: "pilot-discovery",
                package: "istio.io/istio/pilot/cmd/pilot-discovery",
                takes: "three minutes on two cores, once",
            },
            Program {
                name: "istioctl",
                package: "istio.io/istio/istioctl/cmd/istioctl",
                takes: "half a minute",
            },
        ],
    },
];

const LIMIT: Duration = Duration::from_secs(60 * 60);
