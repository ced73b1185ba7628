//! Certificates for programs that are not ours, made with openssl. Takes an authority, the mesh's own
//! or a fresh one, and names; gives files; never touches our code, so that a mistake of ours about
//! certificates cannot hide itself.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{process::output, topology::Topology};

/// A root that signs.
#[derive(Clone, Debug)]
pub struct Authority {
    /// PEM, for whoever is to trust it.
    pub certificate: PathBuf,
    key: PathBuf,
}

/// A certificate with its key, both PEM, and the root that vouches for it.
#[derive(Clone, Debug)]
pub struct Issued {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub root: PathBuf,
}

impl Authority {
    /// The root of the mesh, which the first node process makes.
    pub fn of_mesh(topology: &Topology) -> Result<Self> {
        let directory = topology.directory()?.join("ca");
        Ok(Self {
            certificate: directory.join("root-cert.pem"),
            key: directory.join("root-key.pem"),
        })
    }

    /// A root that knows nothing of the mesh, for the TLS of applications.
    pub fn create(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory)?;
        let own = Self {
            certificate: directory.join("app-root.pem"),
            key: directory.join("app-root-key.pem"),
        };
        new_key(&own.key)?;
        let (key, certificate) = (text(&own.key)?, text(&own.certificate)?);
        openssl(&[
            "req",
            "-x509",
            "-new",
            "-key",
            key,
            "-subj",
            "/CN=root of the applications",
            "-days",
            "1",
            "-out",
            certificate,
        ])?;
        Ok(own)
    }

    /// A certificate for both ends of TLS with these alternative names, written as openssl takes them:
    /// `URI:spiffe://…`, `IP:10.88.1.10`, `DNS:db`. The files begin with `name`.
    pub fn issue(&self, directory: &Path, name: &str, names: &[String]) -> Result<Issued> {
        fs::create_dir_all(directory)?;
        let file = |end: &str| directory.join(format!("{name}-{end}"));
        let issued = Issued {
            certificate: file("cert.pem"),
            key: file("key.pem"),
            root: self.certificate.clone(),
        };
        let (request, extensions) = (file("request.pem"), file("extensions"));
        new_key(&issued.key)?;
        fs::write(
            &extensions,
            format!(
                "basicConstraints=critical,CA:FALSE\n\
                 keyUsage=critical,digitalSignature\n\
                 extendedKeyUsage=serverAuth,clientAuth\n\
                 subjectAltName={}\n",
                names.join(",")
            ),
        )?;
        let subject = format!("/CN={name}");
        let key = text(&issued.key)?;
        let (request, extensions) = (text(&request)?, text(&extensions)?);
        openssl(&[
            "req", "-new", "-key", key, "-subj", &subject, "-out", request,
        ])?;
        openssl(&[
            "x509",
            "-req",
            "-in",
            request,
            "-CA",
            text(&self.certificate)?,
            "-CAkey",
            text(&self.key)?,
            "-days",
            "1",
            "-extfile",
            extensions,
            "-out",
            text(&issued.certificate)?,
        ])?;
        Ok(issued)
    }
}

fn new_key(path: &Path) -> Result<()> {
    openssl(&[
        "genpkey",
        "-algorithm",
        "EC",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-out",
        text(path)?,
    ])
}

fn openssl(args: &[&str]) -> Result<()> {
    output(None, "openssl", args, "").map(drop)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}
