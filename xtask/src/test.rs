//! placeholder
use anyhow::Result;
use clap::Args;
use std::process::ExitCode;
#[derive(Args)]
pub(crate) struct Options {}
pub(crate) fn run(_o: &Options) -> Result<ExitCode> {
    anyhow::bail!("later")
}
