//! `cargo xtask floors`: reads what every room of `ztunnel/src` imports outside its tests, and fails, with file, line
//! and rule, on an import that goes up or sideways or reaches for what the room must not touch; it changes nothing.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::house::{self, House};
use crate::source::{self, Names};

/// Prints each breach; true if there was none.
pub(crate) fn run(house: &House) -> Result<bool> {
    let (breaches, files) = inspect(house)?;
    for breach in &breaches {
        println!(
            "{}:{}: {}",
            house.short(&breach.file).display(),
            breach.line,
            breach.rule
        );
    }
    println!("floors: {files} files, {} breaches", breaches.len());
    Ok(breaches.is_empty())
}

/// Every breach, and how many files were read.
pub(crate) fn inspect(house: &House) -> Result<(Vec<Breach>, usize)> {
    let top = house.root.join("ztunnel/src");
    let mut files = Vec::new();
    for path in house::rust_files(&top)? {
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        files.push((path, source::names(&text)));
    }
    let test_only: BTreeSet<PathBuf> = files
        .iter()
        .flat_map(|(path, names)| {
            let home = module_home(path);
            names
                .test_modules
                .iter()
                .map(move |module| home.join(module))
        })
        .collect();
    let mut breaches = Vec::new();
    for (path, names) in &files {
        let module = module_path(&top, path);
        let is_test = module.iter().any(|name| name == "tests")
            || path
                .ancestors()
                .any(|above| test_only.contains(&above.with_extension("")));
        if !is_test {
            breaches.extend(judge(path, &module, names));
        }
    }
    Ok((breaches, files.len()))
}

/// An import that the house forbids.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Breach {
    pub(crate) file: PathBuf,
    pub(crate) line: usize,
    pub(crate) rule: Rule,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// The room has no floor in the table.
    Homeless { room: String },
    /// Up or sideways.
    Import { room: &'static Room, of: String },
    /// A glob of the crate's root would hide what is imported.
    RootGlob { room: &'static Room },
    /// Outside the room's reach: an external name.
    Touch {
        room: &'static Room,
        name: String,
        why: &'static str,
    },
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Homeless { room } => {
                write!(
                    f,
                    "`{room}` has no floor: give it one in the table of floors.rs"
                )
            }
            Self::Import { room, of } => write!(f, "{room} imports `{of}`; {}", room.may()),
            Self::RootGlob { room } => {
                write!(
                    f,
                    "{room} imports the crate's root as a glob: name what is meant"
                )
            }
            Self::Touch { room, name, why } => write!(f, "{room} touches `{name}`: {why}"),
        }
    }
}

/// A top-level module of the crate and what it may import.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Room {
    name: &'static str,
    floor: u8,
    /// The highest floor that it imports as a whole; 0 is `ebpf/abi`.
    up_to: u8,
    /// Rooms above that floor which it imports all the same.
    and: &'static [&'static str],
}

impl Room {
    fn may_import(&self, other: &Self) -> bool {
        self.name == other.name || other.floor <= self.up_to || self.and.contains(&other.name)
    }

    fn may(&self) -> String {
        let mut may = match self.up_to {
            0 => "it may import no other room".to_owned(),
            1 => "it may import floor 1".to_owned(),
            up_to => format!("it may import floors 1 to {up_to}"),
        };
        for name in self.and {
            may.push_str(" and ");
            may.push_str(name);
        }
        may
    }
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (floor {})", self.name, self.floor)
    }
}

fn judge(file: &Path, module: &[String], names: &Names) -> Vec<Breach> {
    let Some(top) = module.first() else {
        return Vec::new();
    };
    let Some(room) = room(top) else {
        let rule = Rule::Homeless { room: top.clone() };
        return vec![Breach {
            file: file.to_path_buf(),
            line: 1,
            rule,
        }];
    };
    let aliases = source::aliases(&names.paths);
    let mut breaches: Vec<Breach> = Vec::new();
    for path in &names.paths {
        let mut segments = path.segments.clone();
        if !path.imported
            && let Some(first) = segments.first()
            && let Some(full) = aliases.get(first.as_str())
        {
            segments.splice(..1, full.iter().cloned());
        }
        let mut here = module.to_vec();
        here.extend(path.inside.iter().cloned());
        let rule = match inside_crate(&here, &segments) {
            Some(inner) => judge_inner(room, inner.first()),
            None => judge_outer(room, &segments),
        };
        if let Some(rule) = rule {
            let breach = Breach {
                file: file.to_path_buf(),
                line: path.line,
                rule,
            };
            if !breaches.contains(&breach) {
                breaches.push(breach);
            }
        }
    }
    breaches
}

/// The path from the crate's root, if it starts with `crate`, `self` or `super`.
fn inside_crate(here: &[String], segments: &[String]) -> Option<Vec<String>> {
    let mut at = match segments.first()?.as_str() {
        "crate" => Vec::new(),
        "self" | "super" => here.to_vec(),
        _ => return None,
    };
    for segment in segments {
        match segment.as_str() {
            "crate" | "self" => {}
            "super" => {
                at.pop();
            }
            name => at.push(name.to_owned()),
        }
    }
    Some(at)
}

fn judge_inner(room: &'static Room, target: Option<&String>) -> Option<Rule> {
    match target.map(String::as_str) {
        None | Some("*") => Some(Rule::RootGlob { room }),
        Some(name) => match self::room(name) {
            Some(other) if room.may_import(other) => None,
            // Macros and values at the crate's root belong to nobody below.
            Some(_) | None => Some(Rule::Import {
                room,
                of: format!("crate::{name}"),
            }),
        },
    }
}

fn judge_outer(room: &'static Room, segments: &[String]) -> Option<Rule> {
    let path = segments.join("::");
    let within = |name: &str| path == name || path.starts_with(&format!("{name}::"));
    let banned = REACH.iter().find(|reach| {
        (reach.forbidden_to)(room)
            && reach.names.iter().any(|name| within(name))
            && !reach.except.iter().any(|name| within(name))
    })?;
    Some(Rule::Touch {
        room,
        name: path,
        why: banned.why,
    })
}

fn room(name: &str) -> Option<&'static Room> {
    ROOMS.iter().find(|room| room.name == name)
}

/// `tunnel/pool.rs` is `["tunnel", "pool"]`; `lib.rs` is the root.
fn module_path(top: &Path, file: &Path) -> Vec<String> {
    let inner = file.strip_prefix(top).unwrap_or(file).with_extension("");
    let mut module: Vec<String> = inner
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    if module
        .last()
        .is_some_and(|last| last == "mod" || last == "lib")
    {
        module.pop();
    }
    module
}

/// The directory in which a file's out-of-line modules lie.
fn module_home(file: &Path) -> PathBuf {
    let is_root = ["mod.rs", "lib.rs", "main.rs"]
        .iter()
        .any(|name| file.ends_with(name));
    if is_root {
        file.parent().map(Path::to_path_buf).unwrap_or_default()
    } else {
        file.with_extension("")
    }
}

const fn at(name: &'static str, floor: u8, up_to: u8, and: &'static [&'static str]) -> Room {
    Room {
        name,
        floor,
        up_to,
        and,
    }
}

/// The house, from the ground. Nobody below floor 7 imports floor 7, because no `up_to` below reaches it.
const ROOMS: [Room; 28] = [
    at("model", 1, 0, &[]),
    at("proto", 1, 0, &[]),
    at("wire", 2, 1, &[]),
    at("resolve", 2, 1, &[]),
    at("authz", 2, 1, &["resolve"]),
    at("drain", 3, 1, &[]),
    at("rpc", 3, 1, &[]),
    at("capture", 4, 3, &[]),
    at("identity", 4, 3, &[]),
    at("account", 4, 3, &[]),
    at("tunnel", 5, 3, &["identity"]),
    at("control", 5, 3, &["identity"]),
    at("enrol", 5, 3, &["capture"]),
    at("context", 6, 5, &[]),
    at("outbound", 6, 5, &["context"]),
    at("inbound", 6, 5, &["context"]),
    at("passthrough", 6, 5, &["context"]),
    at("socks5", 6, 5, &["context", "outbound"]),
    at("dns", 6, 5, &["context"]),
    at("config", 7, 7, &[]),
    at("admin", 7, 7, &[]),
    at("logging", 7, 7, &[]),
    at("mesh", 7, 7, &[]),
    at("stats", 7, 7, &[]),
    at("keeper", 7, 7, &[]),
    at("worker", 7, 7, &[]),
    at("app", 7, 7, &[]),
    at("main", 7, 7, &[]),
];

/// External names that some rooms must not touch.
struct Reach {
    forbidden_to: fn(&Room) -> bool,
    names: &'static [&'static str],
    except: &'static [&'static str],
    why: &'static str,
}

const REACH: [Reach; 5] = [
    Reach {
        forbidden_to: |room| room.floor <= 2 && room.name != "authz",
        names: &["tokio"],
        except: &[],
        why: "floors 1 and 2 are pure",
    },
    Reach {
        forbidden_to: |room| room.name == "authz",
        names: &["tokio"],
        except: &["tokio::sync"],
        why: "authz is pure but for tokio::sync",
    },
    Reach {
        forbidden_to: |room| room.floor <= 2,
        names: &["tracing", "tracing_subscriber", "prometheus_client"],
        except: &[],
        why: "floors 1 and 2 return their explanation instead of logging or counting it",
    },
    Reach {
        forbidden_to: |room| room.floor <= 2,
        names: &[
            "std::env",
            "std::fs",
            "std::io",
            "std::net::TcpListener",
            "std::net::TcpStream",
            "std::net::UdpSocket",
            "std::os",
            "std::process",
            "std::thread",
            "std::time::Instant",
            "std::time::SystemTime",
        ],
        except: &["std::io::Error", "std::io::ErrorKind"],
        why: "floors 1 and 2 take time, input and randomness as arguments",
    },
    Reach {
        forbidden_to: |room| room.name != "capture",
        names: &["aya", "nix", "rtnetlink"],
        except: &[],
        why: "only capture talks to the kernel",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The rules that a file of this module breaks, as they are printed.
    fn breaks(module: &[&str], text: &str) -> Vec<String> {
        let module: Vec<String> = module.iter().map(|&name| name.to_owned()).collect();
        let found = judge(Path::new("x.rs"), &module, &source::names(text));
        found
            .iter()
            .map(|breach| format!("{}: {}", breach.line, breach.rule))
            .collect()
    }

    #[test]
    fn an_import_upwards_is_found_however_it_is_written() {
        let ways = [
            "use crate::config::Config;",
            "use crate::{model::Flow, config};",
            "use super::super::config::Config;",
            "fn f() -> crate::config::Config { x }",
            "mod inner { use super::super::super::config; }",
            "use crate::config as settings;",
            "macro_rules! m { () => { $crate::config::get() } }",
        ];
        for way in ways {
            let found = breaks(&["tunnel", "pool"], way);
            let said = "1: tunnel (floor 5) imports `crate::config`; \
                        it may import floors 1 to 3 and identity";
            assert_eq!(found, [said], "{way}");
        }
    }

    #[test]
    fn an_import_sideways_is_found() {
        for (room, other) in [
            ("wire", "resolve"),
            ("resolve", "authz"),
            ("identity", "capture"),
            ("capture", "account"),
            ("tunnel", "account"),
            ("tunnel", "capture"),
            ("control", "enrol"),
            ("drain", "wire"),
            ("outbound", "inbound"),
            ("inbound", "config"),
        ] {
            assert_eq!(
                breaks(&[room], &format!("use crate::{other}::X;")).len(),
                1,
                "{room} {other}"
            );
        }
    }

    #[test]
    fn what_the_table_allows_passes() {
        for (room, other) in [
            ("wire", "model"),
            ("authz", "resolve"),
            ("capture", "drain"),
            ("tunnel", "identity"),
            ("control", "identity"),
            ("enrol", "capture"),
            ("outbound", "capture"),
            ("passthrough", "tunnel"),
            ("app", "config"),
            ("config", "app"),
            ("tunnel", "tunnel"),
        ] {
            let found = breaks(
                &[room, "file"],
                &format!("use crate::{other}::X; use super::Y;"),
            );
            assert!(found.is_empty(), "{room} {other}: {found:?}");
        }
    }

    #[test]
    fn tests_may_import_anything() {
        let text = "#[cfg(test)] mod tests { use crate::config::Config; use tokio::time; }";
        assert!(breaks(&["model", "flow"], text).is_empty());
    }

    #[test]
    fn a_glob_of_the_root_is_found() {
        assert_eq!(breaks(&["outbound"], "use super::*;").len(), 1);
        assert_eq!(breaks(&["outbound"], "use crate::*;").len(), 1);
        assert!(breaks(&["tunnel", "pool"], "use super::*;").is_empty());
    }

    #[test]
    fn a_room_without_a_floor_is_found() {
        let found = breaks(&["attic"], "");
        assert_eq!(
            found,
            ["1: `attic` has no floor: give it one in the table of floors.rs"]
        );
        assert_eq!(breaks(&["model"], "use crate::attic::X;").len(), 1);
    }

    #[test]
    fn the_pure_rooms_touch_no_clock_no_input_and_no_runtime() {
        for (room, text) in [
            ("model", "use tokio::sync::watch;"),
            ("model", "use std::time::{Duration, Instant};"),
            (
                "resolve",
                "use std::time; fn f() { time::SystemTime::now(); }",
            ),
            ("wire", "use std::{fs, str};"),
            ("wire", "fn f() { tracing::info!(\"x\") }"),
            ("authz", "use tokio::time::sleep;"),
            ("authz", "use std::net::{IpAddr, TcpStream};"),
        ] {
            assert_eq!(breaks(&[room, "file"], text).len(), 1, "{room}: {text}");
        }
        for (room, text) in [
            ("authz", "use tokio::sync::watch;"),
            ("model", "use std::time::Duration; use std::net::IpAddr;"),
            ("wire", "use std::io::ErrorKind;"),
            ("drain", "use tokio::time::Instant;"),
        ] {
            assert!(breaks(&[room, "file"], text).is_empty(), "{room}: {text}");
        }
    }

    #[test]
    fn only_capture_talks_to_the_kernel() {
        assert_eq!(breaks(&["enrol"], "use nix::sched::setns;").len(), 1);
        assert_eq!(
            breaks(&["main"], "fn f() { nix::unistd::getpid() }").len(),
            1
        );
        assert!(breaks(&["capture", "bpf"], "use aya::Ebpf; use nix::sched::setns;").is_empty());
    }

    #[test]
    fn modules_and_their_homes_follow_the_files() {
        let top = Path::new("src");
        assert_eq!(
            module_path(top, Path::new("src/tunnel/pool.rs")),
            ["tunnel", "pool"]
        );
        assert_eq!(module_path(top, Path::new("src/tunnel/mod.rs")), ["tunnel"]);
        assert!(module_path(top, Path::new("src/lib.rs")).is_empty());
        assert_eq!(module_home(Path::new("src/lib.rs")), Path::new("src"));
        assert_eq!(module_home(Path::new("src/a/b.rs")), Path::new("src/a/b"));
    }
}
