//! What users install: an archive and a Debian package, both of the same tree of files.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::process::{cargo, output, run as run_command};
use crate::{host, paths, static_program};

/// What `cargo xtask release` makes.
const VERSION: &str = env!("CARGO_PKG_VERSION");
const NAME: &str = "clone-army";
/// The programs, and the shells that completions are made for: name, folder, file.
const PROGRAMS: [&str; 2] = ["clone", "army"];
const SHELLS: [(&str, &str, &str); 3] = [
    ("bash", "share/bash-completion/completions", ""),
    ("zsh", "share/zsh/vendor-completions", "_"),
    ("fish", "share/fish/vendor_completions.d", ""),
];
/// Texts that come along.
const TEXTS: [&str; 3] = ["README.md", "CHANGELOG.md", "LICENSE"];

/// Builds with full optimisation, and makes the archive and the package. `clone` and `army` carry
/// the process of VMs and the agent in themselves, so that each alone is whole.
pub(crate) fn run() -> Result<ExitCode> {
    host::install_packages()?;
    let folder = paths::target().join("release-files");
    let vm_process = static_program::vm_process("release")?;
    let share_server = static_program::share_server("release")?;
    let agent = static_program::for_guests("clone-agent")?;
    let carried = folder.join("carried");
    install_stripped(&vm_process, &carried.join("clone-vm"))?;
    install_stripped(&share_server, &carried.join("clone-share"))?;
    install(&agent, &carried.join("clone-agent"), 0o755)?;
    let mut build = vec!["build", "--quiet", "--release"];
    build.extend(PROGRAMS.iter().flat_map(|program| ["-p", program]));
    run_command(cargo(&build).env("CLONE_CARRIED", &carried))
        .context("cannot build the programs")?;
    let made = make(
        &paths::target().join("release"),
        [&vm_process, &share_server],
        &folder,
    )?;
    for path in made {
        println!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// How the package is compressed.
#[derive(Clone, Copy)]
enum Compression {
    /// Small.
    Full,
    /// Quickly made.
    Quick,
}

/// Makes archive and package in `folder`, of the programs in `built` and those of VMs' processes and
/// shares' servers.
fn make(built: &Path, jailed: [&Path; 2], folder: &Path) -> Result<[PathBuf; 2]> {
    let tree = tree(built, jailed, folder)?;
    Ok([archive(&tree)?, package(&tree, folder, Compression::Full)?])
}

/// Makes a package to be tested. Whether it installs does not depend on optimisation, static
/// linking and compression, which take minutes.
pub(crate) fn package_to_test(built: &Path, folder: &Path) -> Result<PathBuf> {
    let tree = tree(
        built,
        [&built.join("clone-vm"), &built.join("clone-share")],
        folder,
    )?;
    package(&tree, folder, Compression::Quick)
}

fn tree(built: &Path, jailed: [&Path; 2], folder: &Path) -> Result<PathBuf> {
    let agent = static_program::for_guests("clone-agent")?;
    let tree = folder.join(format!("{NAME}-{VERSION}-x86_64"));
    if tree.exists() {
        fs::remove_dir_all(&tree).context("cannot remove what was made before")?;
    }
    lay_out(built, jailed, &agent, &tree)?;
    Ok(tree)
}

/// The files, below `tree` as below `/usr`.
fn lay_out(programs: &Path, jailed: [&Path; 2], agent: &Path, tree: &Path) -> Result<()> {
    let pages = tree.join("share/man/man1");
    fs::create_dir_all(&pages)?;
    for program in PROGRAMS {
        let installed = tree.join("bin").join(program);
        install_stripped(&programs.join(program), &installed)?;
        run_command(Command::new(&installed).arg("man").arg(&pages))
            .with_context(|| format!("{program} does not write its manual"))?;
        for (shell, place, prefix) in SHELLS {
            let script = output(Command::new(&installed).args(["completions", shell]))?;
            let name = match shell {
                "fish" => format!("{program}.fish"),
                _ => format!("{prefix}{program}"),
            };
            write(&tree.join(place).join(name), &script, 0o644)?;
        }
    }
    install(agent, &tree.join("lib/clone/clone-agent"), 0o755)?;
    for (program, name) in jailed.into_iter().zip(["clone-vm", "clone-share"]) {
        install_stripped(program, &tree.join("lib/clone").join(name))?;
    }
    let workspace = paths::workspace();
    for text in TEXTS {
        let target = tree.join("share/doc").join(NAME).join(text);
        install(&workspace.join(text), &target, 0o644)?;
    }
    for entry in fs::read_dir(workspace.join("packaging/systemd"))? {
        let unit = entry?;
        let target = tree.join("lib/systemd/system").join(unit.file_name());
        install(&unit.path(), &target, 0o644)?;
    }
    Ok(())
}

/// Installs a program without what debuggers want of it.
fn install_stripped(from: &Path, to: &Path) -> Result<()> {
    install(from, to, 0o755)?;
    run_command(Command::new("strip").arg(to))
}

fn install(from: &Path, to: &Path, mode: u32) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file is in a folder")?)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(mode))?)
}

fn write(to: &Path, text: &str, mode: u32) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file is in a folder")?)?;
    fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(mode))?)
}

/// The same files give the same archive.
fn archive(tree: &Path) -> Result<PathBuf> {
    let folder = tree.parent().context("the tree is in a folder")?;
    let name = tree.file_name().unwrap_or_default();
    let path = folder.join(format!("{}.tar.xz", name.display()));
    run_command(
        Command::new("tar")
            .args(["--create", "--xz", "--sort=name", "--mtime=@0"])
            .args(["--owner=0", "--group=0", "--numeric-owner", "--file"])
            .arg(&path)
            .arg("--directory")
            .arg(folder)
            .arg(name),
    )?;
    Ok(path)
}

fn package(tree: &Path, folder: &Path, compression: Compression) -> Result<PathBuf> {
    let root = folder.join("package");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    fs::create_dir_all(root.join("DEBIAN"))?;
    run_command(Command::new("cp").arg("-r").arg(tree).arg(root.join("usr")))?;
    write(&root.join("DEBIAN/control"), &control(), 0o644)?;
    let path = folder.join(format!("{NAME}_{VERSION}_amd64.deb"));
    run_command(
        Command::new("dpkg-deb")
            .args(match compression {
                Compression::Full => ["-Zxz", "-z6"],
                Compression::Quick => ["-Zgzip", "-z1"],
            })
            .args(["--root-owner-group", "--build"])
            .arg(&root)
            .arg(&path)
            .stdout(std::process::Stdio::null()),
    )?;
    fs::remove_dir_all(&root)?;
    Ok(path)
}

/// The programs link with glibc alone, as it is in Debian 12 and later.
fn control() -> String {
    format!(
        "Package: {NAME}\n\
         Version: {VERSION}\n\
         Architecture: amd64\n\
         Maintainer: Clone and Army <maintainers@clone-army.invalid>\n\
         Section: admin\n\
         Priority: optional\n\
         Depends: libc6 (>= 2.36), libgcc-s1\n\
         Recommends: ca-certificates\n\
         Description: micro-VMs that fork, and a service that runs them\n \
         clone boots Linux under KVM, makes templates of running machines and forks them;\n \
         army runs those clones over many hosts behind a REST API.\n \
         The units army-dev, army-controller and army-node start when they are enabled.\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_says_what_dpkg_asks_for() {
        let control = control();
        for field in [
            "Package",
            "Version",
            "Architecture",
            "Maintainer",
            "Description",
        ] {
            assert!(control.contains(&format!("{field}: ")), "{field}");
        }
        let description = control.split("Description").nth(1).unwrap();
        assert!(
            description
                .lines()
                .skip(1)
                .all(|line| line.starts_with(' '))
        );
    }
}
