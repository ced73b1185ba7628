//! The kernel: sole importer of aya and nix.
