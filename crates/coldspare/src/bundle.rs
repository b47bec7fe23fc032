//! A bundle of the references that only this host had (R6), for each repository in a quarantine.
//!
//! What a new session took away is in the quarantine already, durably; a bundle is what git takes it back from with one
//! command. Made beside the daemon's work, once for each quarantine, as long as git is there.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use coldspare_core::RelPath;
use coldspare_core::git::{self, Part};
use serde_json::{Value, json};

/// LIMIT: bytes of a list that is read for references.
const LIST_BYTES_MAX: u64 = 256 << 20;

/// References of a repository: names and what they name.
type References = BTreeMap<String, String>;

/// Makes the bundles that the quarantines of a root lack; trouble is logged, and listed. `shown` is where people find the root.
fn make_missing(root: &Path, shown: &Path) {
    let quarantines = fs::read_dir(root.join(".coldspare/quarantine")).into_iter().flatten().filter_map(Result::ok).map(|e| e.path());
    for at in quarantines.filter(|at| at.join("LIST").exists() && !at.join("bundles/LIST").exists()) {
        if let Err(e) = make_of(root, shown, &at) {
            tracing::warn!(quarantine = %at.display(), error = %e, "no bundles of what only this host had; its files are in the quarantine");
        }
    }
}

/// As [`make_missing`], for all roots, on a thread of its own.
pub(crate) fn make_missing_beside(roots: Vec<(PathBuf, PathBuf)>) {
    let make = move || roots.iter().for_each(|(root, shown)| make_missing(root, shown));
    if let Err(e) = std::thread::Builder::new().name("bundles".into()).spawn(make) {
        tracing::warn!(error = %e, "no thread can be started; bundles are made at the next start");
    }
}

/// The list of bundles is written last: without it all of them are made anew.
fn make_of(root: &Path, shown: &Path, at: &Path) -> std::io::Result<()> {
    let bundles = at.join("bundles");
    fs::create_dir_all(&bundles)?;
    // Two may be at it: the daemon in its next role, say. Gone with the process.
    let one_at_a_time = fs::File::open(&bundles)?;
    one_at_a_time.lock()?;
    if bundles.join("LIST").exists() {
        return Ok(());
    }
    let mut lines = String::new();
    for (repository, lost) in lost_references(root, at)? {
        let to = bundles.join(format!("{}.bundle", repository.to_string().replace('/', "%")));
        let outcome = bundle(root, at, &repository, &lost, &to);
        let shown = |path: PathBuf| path.strip_prefix(root).map(|inner| shown.join(inner)).unwrap_or(path);
        let (bundle, error) = match outcome {
            Ok(path) => (path.map(shown), None),
            Err(e) => (None, Some(e)),
        };
        let line = json!({"repository": repository.to_string(), "references": lost, "bundle": bundle, "error": error});
        lines.push_str(&format!("{line}\n"));
    }
    let (new, list) = (bundles.join("LIST.new"), bundles.join("LIST"));
    let mut file = fs::File::create(&new)?;
    file.write_all(lines.as_bytes())?;
    file.sync_all()?;
    fs::rename(new, list)?;
    fs::File::open(&bundles)?.sync_all()
}

/// What the list of a quarantine says of references that the tree doesn't have like this.
fn lost_references(root: &Path, at: &Path) -> std::io::Result<BTreeMap<RelPath, References>> {
    let mut found: BTreeMap<RelPath, References> = BTreeMap::new();
    if fs::metadata(at.join("LIST"))?.len() > LIST_BYTES_MAX {
        return Err(std::io::Error::other("its LIST is too long"));
    }
    for line in fs::read_to_string(at.join("LIST"))?.lines() {
        let Ok(value) = serde_json::from_str::<Value>(line) else { continue };
        let Some(path) = value["path"].as_str().and_then(|path| RelPath::new(path.as_bytes()).ok()) else { continue };
        let Some(repository) = repository_of(root, at, &path) else { continue };
        let inside = path.below(&repository).unwrap_or_default();
        // Of the second namespace git knows nothing.
        let named = |name: &str| if name.starts_with("refs/") { name.to_string() } else { format!("refs/{name}") };
        match git::part(&path) {
            Part::LooseRef => {
                if let (Some(id), Ok(name)) = (value["was"].as_str().filter(|id| is_object_id(id)), std::str::from_utf8(inside)) {
                    found.entry(repository).or_default().insert(named(name), id.into());
                }
            }
            Part::PackedRefs => {
                let packed = fs::read_to_string(below(&at.join("tree"), &path)).unwrap_or_default();
                for (id, name) in packed.lines().filter_map(|line| line.split_once(' ')).filter(|(id, _)| is_object_id(id)) {
                    // A loose one counts, whichever comes first in the list.
                    found.entry(repository.clone()).or_default().entry(named(name)).or_insert_with(|| id.into());
                }
            }
            _ => {}
        }
    }
    for (repository, lost) in &mut found {
        let here = references(&below(root, repository));
        lost.retain(|name, id| here.get(name) != Some(id));
    }
    found.retain(|_, lost| !lost.is_empty());
    Ok(found)
}

fn repository_of(root: &Path, at: &Path, path: &RelPath) -> Option<RelPath> {
    let is_repository = |base: &RelPath| [root, &at.join("tree")].into_iter().any(|top| below(top, base).join("objects").exists());
    match git::part(path) {
        Part::PackedRefs => path.parent().filter(is_repository),
        _ => git::possible_repositories(path).into_iter().find(is_repository),
    }
}

fn below(top: &Path, path: &RelPath) -> PathBuf {
    top.join(OsStr::from_bytes(path.as_bytes()))
}

/// Makes a bundle of `lost` that needs what the tree has; its path, or `None` where the tree has all of that, under other names.
fn bundle(root: &Path, at: &Path, repository: &RelPath, lost: &References, to: &Path) -> Result<Option<PathBuf>, String> {
    // A repository that borrows from both: what the tree has, and what left it.
    let dir = at.join("bundles/repository.new");
    let _ = fs::remove_dir_all(&dir);
    let failed = |e: std::io::Error| e.to_string();
    let tree = below(root, repository);
    let format = if lost.values().any(|id| id.len() > 40) { "sha256" } else { "sha1" };
    run(Command::new("git").args(["init", "-q", "--bare", "--object-format", format]).arg(&dir), "")?;
    let objects = [tree.join("objects"), below(&at.join("tree"), repository).join("objects")];
    let borrowed: String = objects.iter().filter(|o| o.exists()).map(|o| format!("{}\n", o.display())).collect();
    fs::write(dir.join("objects/info/alternates"), borrowed).map_err(failed)?;
    let packed: String = lost.iter().map(|(name, id)| format!("{id} {name}\n")).collect();
    fs::write(dir.join("packed-refs"), packed).map_err(failed)?;
    let wanted: String =
        lost.keys().map(|name| format!("{name}\n")).chain(references(&tree).values().map(|id| format!("^{id}\n"))).collect();
    let new = to.with_extension("new");
    let git = || {
        let mut git = Command::new("git");
        git.arg("--git-dir").arg(&dir);
        git
    };
    let first = run(git().args(["rev-list", "--max-count=1", "--stdin"]), &wanted);
    let has_all = first.is_ok_and(|first| first.is_empty());
    let made = if has_all { Ok(String::new()) } else { run(git().args(["bundle", "create", "-q"]).arg(&new).arg("--stdin"), &wanted) };
    let _ = fs::remove_dir_all(&dir);
    made?;
    if has_all {
        return Ok(None);
    }
    fs::File::open(&new).and_then(|file| file.sync_all()).and_then(|()| fs::rename(&new, to)).map_err(failed)?;
    Ok(Some(to.into()))
}

fn references(repository: &Path) -> References {
    let mut command = Command::new("git");
    command.args(["-c", "safe.directory=*", "--git-dir"]).arg(repository);
    let listed = run(command.args(["for-each-ref", "--format=%(objectname) %(refname)"]), "").unwrap_or_default();
    listed.lines().filter_map(|line| line.split_once(' ')).map(|(id, name)| (name.into(), id.into())).collect()
}

fn is_object_id(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn run(command: &mut Command, input: &str) -> Result<String, String> {
    let text = |e: std::io::Error| format!("git: {e}");
    let mut child = command
        .env("LC_ALL", "C")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(text)?;
    if let Some(mut stdin) = child.stdin.take() {
        let input = input.to_string();
        // Whoever doesn't read it says why.
        std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    }
    let output = child.wait_with_output().map_err(text)?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_string());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
