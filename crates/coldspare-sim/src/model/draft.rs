//! A changeset made by hand, and the tree that it leaves.

use coldspare_core::changeset::{Ask, ContentRef, FilePart, Have, Recipe};
use coldspare_core::{Baseline, Body, Digest, Entry, Meta, Op, RelPath, RootId, Time, codec};
use coldspare_delta::{Piece, encode_pieces};
use coldspare_os::Disk;
use coldspare_standby::{Standby, StandbyError};

use super::expected::{Expected, Holds};

/// The operations of one changeset, in the order in which they are handed over.
#[derive(Debug, Clone)]
pub struct Draft {
    baseline: Baseline,
    steps: Vec<Step>,
    before: Expected,
    /// What the tree is to be afterwards.
    pub expected: Expected,
    files: u32,
    stamp: i64,
}

#[derive(Debug, Clone)]
enum Step {
    Op(Op, Vec<u8>),
    /// The standby is asked first, as a capture that isn't sure does.
    Asked(RelPath, Entry, Vec<u8>),
    Segment {
        part: FilePart,
        literal: Vec<u8>,
    },
}

const ROOT: RootId = RootId(0);

impl Draft {
    /// Begins a changeset on the tree `before`; `stamp` makes its times differ from others'.
    pub fn new(baseline: Baseline, before: &Expected, stamp: u64) -> Draft {
        let expected = if baseline == Baseline::Full { Expected::default() } else { before.clone() };
        let mut draft = Draft { baseline, steps: Vec::new(), before: before.clone(), expected, files: 0, stamp: stamp as i64 };
        draft.dir("");
        draft
    }

    /// What it starts from.
    pub fn baseline(&self) -> Baseline {
        self.baseline
    }

    /// Puts a folder.
    pub fn dir(&mut self, path: &str) {
        self.put(path, 0o750, Body::Dir, ContentRef::None, b"");
    }

    /// Puts a file whose content comes with it.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        self.put(path, 0o644, body(content, false), ContentRef::Inline, content);
    }

    /// Puts a file with holes whose content comes with it.
    pub fn sparse(&mut self, path: &str, content: &[u8]) {
        self.put(path, 0o600, body(content, true), ContentRef::Inline, content);
    }

    /// Puts a file of which the standby is asked whether it has it.
    pub fn asked(&mut self, path: &str, content: &[u8]) {
        let entry = self.entry(path, 0o644, body(content, false));
        self.steps.push(Step::Asked(rel(path), entry.clone(), content.to_vec()));
        self.expected.put(path.as_bytes(), Holds { entry, content: content.to_vec() });
    }

    /// Puts a file in segments: literal bytes, or a copy of what the standby has at the same path.
    pub fn segments(&mut self, path: &str, parts: &[Part<'_>]) {
        let base = self.before.holds(path.as_bytes()).map(|h| h.content.clone()).unwrap_or_default();
        self.files += 1;
        let (file, mut content) = (self.files, Vec::new());
        for part in parts {
            let offset = content.len() as u64;
            let (piece, literal) = match *part {
                Part::Bytes(bytes) => (Piece::Literal { len: bytes.len() as u32 }, bytes.to_vec()),
                Part::Copy { from, len } => (Piece::Copy { offset: from as u64, len: len as u32 }, Vec::new()),
                Part::Zeros { len } => (Piece::Zeros { len: len as u32 }, Vec::new()),
            };
            match *part {
                Part::Bytes(bytes) => content.extend_from_slice(bytes),
                Part::Copy { from, len } => content.extend_from_slice(&base[from..from + len]),
                Part::Zeros { len } => content.resize(content.len() + len, 0),
            }
            let pieces = encode_pieces(&[piece]);
            let part = FilePart { file, root: ROOT, path: rel(path), offset, sources: Vec::new(), pieces };
            self.steps.push(Step::Segment { part, literal });
        }
        let refers = ContentRef::Segments { file, segments: parts.len() as u32 };
        let entry = self.entry(path, 0o644, body(&content, false));
        self.steps.push(Step::Op(Op::Put { root: ROOT, path: rel(path), entry: entry.clone(), content: refers }, Vec::new()));
        self.expected.put(path.as_bytes(), Holds { entry, content });
    }

    /// Puts a file that the standby makes by this recipe; it comes to `content`.
    pub fn rebuilt(&mut self, path: &str, recipe: &Recipe, content: &[u8]) {
        let entry = self.entry(path, 0o444, body(content, false));
        let recipe = codec::encode(recipe);
        let refers = ContentRef::Rebuilt { recipe_bytes: recipe.len() as u32 };
        let op = Op::Put { root: ROOT, path: rel(path), entry: entry.clone(), content: refers };
        self.steps.push(Step::Op(op, recipe));
        self.expected.put(path.as_bytes(), Holds { entry, content: content.to_vec() });
    }

    /// Puts a symlink.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.put(path, 0o777, Body::Symlink { target: target.into() }, ContentRef::None, b"");
    }

    /// Puts another name of the file at `to`.
    pub fn hardlink(&mut self, path: &str, to: &str) {
        self.put(path, 0o644, Body::Hardlink { to: rel(to) }, ContentRef::None, b"");
    }

    /// Gives a file that stays as it is other attributes.
    pub fn attributes(&mut self, path: &str, mode: u16) {
        let Some(Holds { entry: old, content }) = self.before.holds(path.as_bytes()).cloned() else { panic!("{path} isn't there") };
        let mut entry = self.entry(path, mode, old.body);
        entry.meta.xattrs.push(coldspare_core::Xattr { name: b"user.note".to_vec(), value: path.as_bytes().to_vec() });
        let refers = if entry.is_dir() { ContentRef::None } else { ContentRef::Unchanged };
        self.steps.push(Step::Op(Op::Put { root: ROOT, path: rel(path), entry: entry.clone(), content: refers }, Vec::new()));
        self.expected.put(path.as_bytes(), Holds { entry, content });
    }

    /// Deletes a path and all below it.
    pub fn delete(&mut self, path: &str) {
        self.steps.push(Step::Op(Op::Delete { root: ROOT, path: rel(path) }, Vec::new()));
        self.expected.remove(path.as_bytes());
    }

    /// Renames a folder.
    pub fn rename(&mut self, from: &str, to: &str) {
        self.steps.push(Step::Op(Op::Rename { root: ROOT, from: rel(from), to: rel(to) }, Vec::new()));
        self.expected.rename(from.as_bytes(), to.as_bytes());
    }

    /// Keeps a path and all below it.
    pub fn keep(&mut self, path: &str) {
        self.steps.push(Step::Op(Op::Keep { root: ROOT, path: rel(path) }, Vec::new()));
        let before = self.before.clone();
        self.expected.keep(path.as_bytes(), &before);
    }

    /// How many calls [`Draft::stage`] makes.
    pub fn steps(&self) -> usize {
        self.steps.len()
    }

    /// Hands the first `steps` steps to the standby, each by a call; says how many operations they were.
    ///
    /// # Errors
    /// As the standby.
    pub fn stage<D: Disk>(&self, standby: &Standby<D>, seq: coldspare_core::Seq, steps: usize) -> Result<u64, StandbyError> {
        let mut ops = 0;
        for step in self.steps.iter().take(steps) {
            match step {
                Step::Op(op, content) => {
                    standby.stage_batch(seq, vec![op.clone()], content)?;
                    ops += 1;
                }
                Step::Asked(path, entry, content) => {
                    let digest = entry.digest().expect("a file");
                    let asks = [Ask { root: ROOT, path: path.clone(), digest, size: entry.size() }];
                    let (refers, bytes) = match standby.have(&asks)?[0] {
                        Have::AtPath => (ContentRef::Unchanged, &[][..]),
                        Have::Staged => (ContentRef::Staged, &[][..]),
                        Have::Missing | Have::NoRoom | Have::Part(_) => (ContentRef::Inline, content.as_slice()),
                    };
                    let op = Op::Put { root: ROOT, path: path.clone(), entry: entry.clone(), content: refers };
                    standby.stage_batch(seq, vec![op], bytes)?;
                    ops += 1;
                }
                Step::Segment { part, literal } => {
                    standby.stage_segment(seq, part, literal)?;
                }
            }
        }
        Ok(ops)
    }

    fn put(&mut self, path: &str, mode: u16, body: Body, refers: ContentRef, content: &[u8]) {
        let entry = self.entry(path, mode, body);
        let op = Op::Put { root: ROOT, path: rel(path), entry: entry.clone(), content: refers };
        self.steps.push(Step::Op(op, content.to_vec()));
        self.expected.put(path.as_bytes(), Holds { entry, content: content.to_vec() });
    }

    fn entry(&self, path: &str, mode: u16, body: Body) -> Entry {
        let mtime = Time { secs: 1_000_000 + self.stamp, nanos: path.len() as u32 };
        Entry { meta: Meta { mode, uid: 1000, gid: 1000, mtime, xattrs: Vec::new() }, body }
    }
}

/// A stretch of a file that comes in segments.
#[derive(Debug, Clone, Copy)]
pub enum Part<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// A stretch of the standby's file.
    Copy {
        /// Where.
        from: usize,
        /// How many bytes.
        len: usize,
    },
    /// So many zeros.
    Zeros {
        /// Bytes.
        len: usize,
    },
}

fn body(content: &[u8], sparse: bool) -> Body {
    Body::File { size: content.len() as u64, digest: Digest(coldspare_delta::digest(content)), sparse }
}

fn rel(path: &str) -> RelPath {
    if path.is_empty() { RelPath::root() } else { RelPath::new(path.as_bytes()).expect("a path") }
}
