//! The roots as the configuration names them: found, marked, opened.
//!
//! Each root holds `.coldspare/root`, which says to which pair and under which name it belongs; without it nothing is
//! sent or applied: an unmounted filesystem looks like an empty home.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use coldspare_core::ClusterId;
use coldspare_core::path::CONTROL_DIR;
use coldspare_os::FileLock;

use crate::config::{Config, Root};
use crate::exit::Failure;
use crate::seal::Ways;

const MARKER: &str = "root";
const LOCK: &str = "lock";

/// The control folder of a root.
pub(crate) fn control_dir(root: &Path) -> PathBuf {
    root.join(OsStr::from_bytes(CONTROL_DIR))
}

/// Marks each root as belonging to `cluster`.
///
/// # Errors
/// `Usage` when a root doesn't exist, can't be written, or belongs to another pair.
pub(crate) fn mark(roots: &[Root], cluster: ClusterId) -> Result<(), Failure> {
    for root in roots {
        let path = &root.path;
        let meta = std::fs::metadata(path).map_err(|e| Failure::usage(format!("root {:?}: {}: {e}", root.name, path.display())))?;
        if !meta.is_dir() {
            return Err(Failure::usage(format!("root {:?}: {} is not a folder", root.name, path.display())));
        }
        let dir = control_dir(path);
        let text = marker_text(cluster, root);
        match std::fs::read_to_string(dir.join(MARKER)) {
            Ok(found) if found == text => continue,
            Ok(found) => {
                return Err(Failure::usage(format!(
                    "{} belongs to another pair ({}); if that pair is no more, remove {} first",
                    path.display(),
                    found.trim(),
                    dir.display()
                )));
            }
            Err(_) => {}
        }
        let fail = |e: std::io::Error| Failure::usage(format!("{}: the work folder can't be made: {e}", dir.display()));
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(fail)?;
        coldspare_scan::watch::make_cookie_dir(path).map_err(fail)?;
        std::fs::write(dir.join(MARKER), text).map_err(fail)?;
    }
    Ok(())
}

/// Finds the roots, each resolved once, and checks their markers.
///
/// # Errors
/// `Usage`, naming the root and what to do.
pub(crate) fn resolve(config: &Config, cluster: ClusterId) -> Result<Vec<PathBuf>, Failure> {
    let mut out = Vec::new();
    for root in &config.roots {
        let say = |detail: String| Failure::usage(format!("root {:?}: {}: {detail}", root.name, root.path.display()));
        let path = root.path.canonicalize().map_err(|e| say(format!("{e}; is the filesystem mounted?")))?;
        let marker = control_dir(&path).join(MARKER);
        let found = std::fs::read_to_string(&marker).map_err(|e| {
            say(format!("no marker {} ({e}); is the right filesystem mounted? A new root is marked by `coldspare init`", marker.display()))
        })?;
        if found != marker_text(cluster, root) {
            return Err(say(format!("its marker says {:?}: it belongs to another pair or under another name", found.trim())));
        }
        out.push(path);
    }
    Ok(out)
}

/// The name of a root that certainly isn't there: its folder or its marker is missing, or the marker is another's.
pub(crate) fn missing(config: &Config, cluster: ClusterId) -> Option<&str> {
    let is_missing = |root: &&Root| match std::fs::read_to_string(control_dir(&root.path).join(MARKER)) {
        Ok(found) => found != marker_text(cluster, root),
        // Whoever may not look knows nothing against it.
        Err(e) => e.kind() != std::io::ErrorKind::PermissionDenied,
    };
    config.roots.iter().find(is_missing).map(|root| root.name.as_str())
}

/// What the marker of a root says.
fn marker_text(cluster: ClusterId, root: &Root) -> String {
    format!("{cluster} {}\n", root.name)
}

/// Takes the right to be the one daemon that works on these roots; held until dropped.
///
/// # Errors
/// `Usage` when another has it: both hosts of a pair were given the same folder, say.
pub(crate) fn lock(config: &Config, cluster: ClusterId, ways: &Ways) -> Result<Vec<FileLock>, Failure> {
    let mut locks = Vec::new();
    for (number, path) in resolve(config, cluster)?.into_iter().enumerate() {
        let at = control_dir(&ways.path(number).unwrap_or_else(|| path.clone())).join(LOCK);
        match FileLock::acquire(&at) {
            Ok(Some(lock)) => locks.push(lock),
            Ok(None) => {
                let why = "another coldspare works on this folder; each host of a pair needs a folder of its own";
                return Err(Failure::usage(format!("{}: {why}", path.display())));
            }
            Err(e) => return Err(Failure::usage(format!("{}: can't be locked: {e}", at.display()))),
        }
    }
    Ok(locks)
}
