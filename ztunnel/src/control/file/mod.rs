//! The local file: its shape, its values, and what must hold between them.

mod leaf;
mod parse;
mod shape;

pub use parse::{MAX_FILE_BYTES, PodEntry, State, parse};
