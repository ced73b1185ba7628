//! `cargo xtask test kernels`: boots Debian's other kernels in a software-emulated machine, runs the test programs inside
//! and counts what its console says; takes kernels from the package mirror without installing them.

use anyhow::Result;

use crate::house::House;
use crate::tally::Tally;

pub(crate) fn run(_house: &House, _tally: &mut Tally) -> Result<()> {
    anyhow::bail!("no kernel is known yet")
}
