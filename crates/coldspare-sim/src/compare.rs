//! Reads a tree and tells, in words, how it differs from another.
//!
//! It shares no code with what it judges: `walkdir`, raw metadata and whole contents. What coldspare leaves out by
//! design is left out here too: its own folder, excluded names, git's transient names, special files, set-id bits of files.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A name that the pairs of this crate leave out wherever it stands; see [`EXCLUDED`].
pub const EXCLUDED_SUFFIX: &str = ".skip";

/// The exclude patterns of the pairs of this crate.
pub const EXCLUDED: &[&str] = &["caches/", "*.skip", "**/*.skip"];

/// What is on disk, by path below the root; the root itself is the empty path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree(BTreeMap<PathBuf, Node>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    body: Body,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first name of the same file, when it has several here.
    first_name: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Body {
    Dir,
    File { bytes: u64, hash: u64 },
    Symlink(Vec<u8>),
}

impl Tree {
    /// Reads all below `root`.
    ///
    /// # Panics
    /// When something can't be read.
    pub fn read(root: &Path) -> Tree {
        let mut nodes = BTreeMap::new();
        let mut files: BTreeMap<(u64, u64), Vec<PathBuf>> = BTreeMap::new();
        let walk = walkdir::WalkDir::new(root).into_iter().filter_entry(|e| is_carried(root, e.path(), e.file_type()));
        for entry in walk {
            let entry = entry.expect("a readable tree");
            let below = entry.path().strip_prefix(root).expect("below the root").to_path_buf();
            let meta = entry.path().symlink_metadata().expect("readable metadata");
            let body = if meta.is_dir() {
                Body::Dir
            } else if meta.is_symlink() {
                let target = std::fs::read_link(entry.path()).expect("a readable link");
                Body::Symlink(target.as_os_str().as_bytes().to_vec())
            } else {
                let content = std::fs::read(entry.path()).expect("a readable file");
                let mut hasher = DefaultHasher::new();
                hasher.write(&content);
                files.entry((meta.dev(), meta.ino())).or_default().push(below.clone());
                Body::File { bytes: content.len() as u64, hash: hasher.finish() }
            };
            let mode = match body {
                Body::Dir => meta.mode() & 0o7777,
                Body::File { .. } => meta.mode() & 0o1777,
                Body::Symlink(_) => 0,
            };
            let xattrs = if meta.is_symlink() { BTreeMap::new() } else { xattrs(entry.path()) };
            let owner = (meta.uid(), meta.gid());
            nodes.insert(below, Node { body, mode, owner, mtime: (meta.mtime(), meta.mtime_nsec()), xattrs, first_name: None });
        }
        for names in files.into_values().filter(|names| names.len() > 1) {
            let first = names.iter().min().expect("not empty").clone();
            for name in names {
                nodes.get_mut(&name).expect("just put in").first_name = Some(first.clone());
            }
        }
        Tree(nodes)
    }

    /// How many entries it has, the root included.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is nothing, not even a root.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is otherwise in `found` than here, one sentence each; nothing when they are equal.
    pub fn differences(&self, found: &Tree) -> Vec<String> {
        let mut out = Vec::new();
        for (path, node) in &self.0 {
            match found.0.get(path) {
                None => out.push(format!("{path:?} is missing: {:?}", node.body)),
                Some(other) => out.extend(node.differences(other).into_iter().map(|d| format!("{path:?}: {d}"))),
            }
        }
        out.extend(found.0.keys().filter(|path| !self.0.contains_key(*path)).map(|path| format!("{path:?} should not be there")));
        out
    }
}

impl Node {
    fn differences(&self, other: &Node) -> Vec<String> {
        let mut out = Vec::new();
        let mut tell = |what: &str, same: bool, expected: String, found: String| {
            if !same {
                out.push(format!("{what} is {found} instead of {expected}"));
            }
        };
        let text = |value: &dyn std::fmt::Debug| format!("{value:?}");
        tell("body", self.body == other.body, text(&self.body), text(&other.body));
        tell("mode", self.mode == other.mode, format!("{:o}", self.mode), format!("{:o}", other.mode));
        tell("owner", self.owner == other.owner, text(&self.owner), text(&other.owner));
        tell("mtime", self.mtime == other.mtime, text(&self.mtime), text(&other.mtime));
        tell("xattrs", self.xattrs == other.xattrs, text(&self.xattrs), text(&other.xattrs));
        tell("first name", self.first_name == other.first_name, text(&self.first_name), text(&other.first_name));
        out
    }
}

fn is_carried(root: &Path, path: &Path, kind: std::fs::FileType) -> bool {
    let below = path.strip_prefix(root).expect("below the root");
    let special = kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device();
    let own = below == Path::new(".coldspare");
    let excluded = (below == Path::new("caches") && kind.is_dir()) || below.as_os_str().as_bytes().ends_with(EXCLUDED_SUFFIX.as_bytes());
    !(special || own || excluded || is_transient(root, path))
}

/// git's locks and temporary files, below a folder that has what a repository has.
fn is_transient(root: &Path, path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_bytes();
    let starts = |prefix: &str| name.starts_with(prefix.as_bytes());
    if !(name.ends_with(b".lock") || starts("tmp_") || starts("incoming-")) {
        return false;
    }
    let mut above = path.parent();
    while let Some(dir) = above.filter(|dir| dir.starts_with(root)) {
        if ["HEAD", "objects", "refs"].iter().all(|n| dir.join(n).symlink_metadata().is_ok()) {
            return name.ends_with(b".lock") || path.starts_with(dir.join("objects"));
        }
        above = dir.parent();
    }
    false
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0u8; 64 << 10];
    let len = rustix::fs::llistxattr(path, &mut names[..]).expect("a list of attributes");
    names.truncate(len);
    let carried = |n: &&[u8]| n.starts_with(b"user.") || n.starts_with(b"system.posix_acl_");
    let mut out = BTreeMap::new();
    for name in names.split(|&b| b == 0).filter(carried) {
        let mut value = vec![0u8; 64 << 10];
        let len = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).expect("an attribute");
        value.truncate(len);
        out.insert(name.to_vec(), value);
    }
    out
}
