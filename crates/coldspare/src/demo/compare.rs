//! Whether the two trees are equal, read by nothing that the replication uses.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use coldspare_core::RelPath;
use coldspare_core::exclude::{Exclude, IsDir};

use super::host::failed;
use crate::exit::Failure;

/// Fails with the first difference between `here` and `there`; what `exclude` names must not be there at all.
/// Returns the number of entries.
pub(super) fn trees(here: &Path, there: &Path, exclude: &[&str]) -> Result<usize, Failure> {
    let exclude = Exclude::new(exclude).map_err(Failure::usage)?;
    let nothing = Exclude::new([""; 0]).map_err(Failure::usage)?;
    let (mut active, mut standby) = (BTreeMap::new(), BTreeMap::new());
    list(here, Path::new(""), &exclude, &mut active)?;
    list(there, Path::new(""), &nothing, &mut standby)?;
    let names = active.keys().chain(standby.keys());
    for name in names {
        if active.get(name) != standby.get(name) {
            return Err(failed(format!(
                "{} differs: {} on the active, {} on the standby",
                name.display(),
                active.get(name).map_or("absent".into(), |e| format!("{e:?}")),
                standby.get(name).map_or("absent".into(), |e| format!("{e:?}"))
            )));
        }
        if let Some(Entry { is_file: true, .. }) = active.get(name)
            && fs::read(here.join(name)).ok() != fs::read(there.join(name)).ok()
        {
            return Err(failed(format!("the bytes of {} differ", name.display())));
        }
    }
    Ok(active.len())
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    is_file: bool,
    mode: u32,
    owner: (u32, u32),
    size: u64,
    modified: (i64, i64),
    target: Option<PathBuf>,
}

fn list(root: &Path, below: &Path, exclude: &Exclude, out: &mut BTreeMap<PathBuf, Entry>) -> Result<(), Failure> {
    let dir = root.join(below);
    let fail = |e: std::io::Error| failed(format!("{}: {e}", dir.display()));
    for entry in fs::read_dir(&dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = below.join(entry.file_name());
        let meta = entry.metadata().map_err(fail)?;
        if name == Path::new(".coldspare") {
            continue;
        }
        let is_dir = if meta.is_dir() { IsDir::Yes } else { IsDir::No };
        let path = RelPath::new(name.as_os_str().as_bytes()).map_err(Failure::usage)?;
        if exclude.matches(&path, is_dir) {
            continue;
        }
        let found = Entry {
            is_file: meta.is_file(),
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            size: if meta.is_dir() { 0 } else { meta.size() },
            modified: (meta.mtime(), meta.mtime_nsec()),
            target: fs::read_link(entry.path()).ok(),
        };
        out.insert(name.clone(), found);
        if meta.is_dir() {
            list(root, &name, exclude, out)?;
        }
    }
    Ok(())
}
