//! What the kernel says of this process. Takes `/proc/self`, gives rows of the metrics page; leaves
//! a row out when the kernel does not tell.

use std::fs;

use super::source::{Family, Kind};

/// The rows about this process, as they are now.
pub(super) fn families() -> Vec<Family> {
    let mut families = Vec::new();
    families.extend(open_fds().map(|fds| {
        Family::single(
            "process_open_fds",
            "Open file descriptors of this process",
            Kind::Gauge,
            fds,
        )
    }));
    families.extend(max_fds().map(|fds| {
        Family::single(
            "process_max_fds",
            "Limit of open file descriptors of this process",
            Kind::Gauge,
            fds,
        )
    }));
    families
}

fn open_fds() -> Option<u64> {
    let listed = fs::read_dir("/proc/self/fd").ok()?.count();
    // One of them is the descriptor that lists the others.
    u64::try_from(listed.saturating_sub(1)).ok()
}

fn max_fds() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let row = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    row.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_descriptors_and_their_limit() {
        let open = open_fds().unwrap();
        let max = max_fds().unwrap();
        assert!(open >= 3 && open <= max, "{open} of {max}");
    }
}
