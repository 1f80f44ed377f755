//! Takes the programs that `CLONE_CARRIED` has into the library: a directory with `clone-vm`,
//! `clone-share` and `clone-agent`. Without it nothing is carried, and they are found where they are installed.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const PROGRAMS: [(&str, &str); 3] = [
    ("VM_PROCESS", "clone-vm"),
    ("SHARE_SERVER", "clone-share"),
    ("AGENT", "clone-agent"),
];

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-env-changed=CLONE_CARRIED");
    let folder = env::var_os("CLONE_CARRIED").map(PathBuf::from);
    let mut code = String::new();
    for (constant, name) in PROGRAMS {
        let bytes = match &folder {
            Some(folder) => included(&folder.join(name))?,
            None => "None".to_owned(),
        };
        code += &format!("pub(super) const {constant}: Option<super::Carried> = {bytes};\n");
    }
    let out = env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("cargo sets OUT_DIR"))?;
    fs::write(Path::new(&out).join("carried.rs"), code)
}

fn included(program: &Path) -> io::Result<String> {
    println!("cargo::rerun-if-changed={}", program.display());
    let program = fs::canonicalize(program)?;
    // Computed here, so that no command has to hash the program before it starts a VM.
    let hash = blake3::hash(&fs::read(&program)?).to_hex();
    Ok(format!(
        "Some(super::Carried {{ bytes: include_bytes!({program:?}), hash: {:?} }})",
        &hash[..32]
    ))
}
