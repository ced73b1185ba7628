//! The product's parsers, compiled from its own sources without the rest of it. Takes the rooms
//! that read bytes from outside, gives them to the fuzz targets; never holds a parser of its own.
//!
//! Depending on the package would put TLS, the kernel's side and the eBPF object under the
//! sanitizer's compiler flags: minutes of building for code that no target reaches.

pub mod control;
pub mod identity;
#[path = "../../../ztunnel/src/model/mod.rs"]
pub mod model;
#[path = "../../../ztunnel/src/proto.rs"]
pub mod proto;
pub mod tls;
#[path = "../../../ztunnel/src/wire/mod.rs"]
pub mod wire;
