//! `clone image build`: a bootable disk from a directory, a container image or a Debian suite.

use std::cell::RefCell;
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use clone_api::{ApiError, Bytes, ErrorCode};
use clone_host::{cache, programs};
use clone_image::{
    Credentials, Debian, DiskSize, ImageError, Progress, RegistryImage, RootfsSpec, Source, Step,
    build_rootfs,
};
use clone_start::error::Result;
use indicatif::ProgressBar;

use super::output::human_bytes;
use super::{Context, progress};

/// Build disk images.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Build(BuildArgs),
}

/// Build a bootable disk.
///
/// SOURCE is a directory, an OCI layout, a `docker save` archive, debian:SUITE for a fresh Debian
/// (as in debian:trixie), or else an image in a registry (as in alpine or
/// registry.example/debian:12). For a registry that requires a login, set
/// CLONE_REGISTRY_USER and CLONE_REGISTRY_PASSWORD.
#[derive(Debug, clap::Args)]
struct BuildArgs {
    /// The source to build from.
    source: OsString,
    /// The disk image to make.
    output: PathBuf,
    /// Replace an existing image.
    #[arg(long, short)]
    force: bool,
    /// The disk's size; by default, that of the content plus one GiB of free space.
    #[arg(long, short)]
    size: Option<Bytes>,
    /// A static clone-agent to install in the image, for exec, shell and cp; by default the one
    /// that is installed with this program, if there is one.
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// The guest's host name.
    #[arg(long, default_value = "clone")]
    hostname: String,
    /// A name server for the guest (can be given several times).
    #[arg(long = "dns", value_name = "ADDRESS")]
    name_servers: Vec<IpAddr>,
    /// The image to use from a layout or archive that contains several.
    #[arg(long, value_name = "TAG")]
    image: Option<String>,
    /// A package to add to a Debian suite (can be given several times).
    #[arg(long = "package", short, value_name = "NAME")]
    packages: Vec<String>,
    /// Use plain HTTP for the registry.
    #[arg(long)]
    plain_http: bool,
}

pub(super) fn run(context: &Context, args: Args) -> Result<ExitCode> {
    let Command::Build(args) = args.command;
    let mut spec = RootfsSpec::new(source(&args)?, &args.output);
    spec.replace = args.force;
    spec.agent = match args.agent {
        Some(agent) => Some(agent),
        None => programs::agent()?,
    };
    spec.hostname = args.hostname;
    spec.nameservers = args.name_servers;
    if let Some(size) = args.size {
        spec.size = DiskSize::Total(size.0);
    }
    let bars = Bars {
        context,
        bar: RefCell::new(ProgressBar::hidden()),
    };
    let built = build_rootfs(&spec, &bars).map_err(|error| to_api_error(&error));
    bars.bar.borrow().finish_and_clear();
    let built = built?;
    for left_out in &built.left_out {
        context.output.note(&format!(
            "[clone: {} is left empty: another file system is mounted on it]",
            left_out.display()
        ));
    }
    context.output.print(&built, |report| {
        format!(
            "{}: {}, {} files, init {:?}",
            report.path.display(),
            human_bytes(report.bytes),
            report.inodes,
            report.init
        )
    });
    Ok(ExitCode::SUCCESS)
}

fn source(args: &BuildArgs) -> Result<Source> {
    let text = args.source.to_str();
    if let Some(suite) = text.and_then(|text| text.strip_prefix("debian:")) {
        let mut debian = Debian::new(suite);
        debian.packages.extend(args.packages.iter().cloned());
        return Ok(Source::Debian(debian));
    }
    if !Path::new(&args.source).exists() {
        return registry(args).map(Source::Registry);
    }
    let found = Source::at(&args.source).map_err(|error| to_api_error(&error))?;
    Ok(match found {
        Source::Image { path, .. } => Source::Image {
            path,
            reference: args.image.clone(),
        },
        other => other,
    })
}

/// Parses a source that is not a path as the name of an image. A source that cannot be one is
/// reported as a missing path.
fn registry(args: &BuildArgs) -> Result<RegistryImage> {
    let reference = args.source.to_str();
    let Some(reference) = reference.filter(|text| !text.starts_with(['/', '.'])) else {
        return Err(ApiError::new(
            ErrorCode::InvalidConfig,
            format!("there is no {}", args.source.display()),
        )
        .advise("name a directory, an archive, debian:SUITE, or an image in a registry"));
    };
    let blobs = cache::dir("blobs").ok_or_else(|| {
        ApiError::new(
            ErrorCode::HostUnsupported,
            "there is no place for the image's layers: HOME is not set",
        )
        .advise("set CLONE_CACHE_DIR to a directory of yours")
    })?;
    let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let credentials = match (set("CLONE_REGISTRY_USER"), set("CLONE_REGISTRY_PASSWORD")) {
        (Some(user), Some(password)) => Credentials::Basic { user, password },
        _ => Credentials::Anonymous,
    };
    Ok(RegistryImage {
        reference: reference.to_owned(),
        blobs,
        credentials,
        plain_http: args.plain_http,
    })
}

fn to_api_error(error: &ImageError) -> ApiError {
    let internal = ApiError::internal(error);
    match error {
        ImageError::Io { .. } => internal,
        _ => ApiError {
            code: ErrorCode::InvalidConfig,
            ..internal
        },
    }
}

/// The progress bar of the current step.
struct Bars<'a> {
    context: &'a Context,
    bar: RefCell<ProgressBar>,
}

impl Progress for Bars<'_> {
    fn begin(&self, step: Step, bytes: Option<u64>) {
        let bar = progress::bytes(self.context, bytes);
        bar.set_message(step.to_string());
        self.bar.replace(bar).finish_and_clear();
    }

    fn advance(&self, bytes: u64) {
        self.bar.borrow().inc(bytes);
    }
}
