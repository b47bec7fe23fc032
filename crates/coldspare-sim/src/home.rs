//! Homes made by a seed, and changes to them.
//!
//! Everything that a filesystem may hold occurs: sizes around the thresholds, odd names, links of both kinds, holes,
//! attributes, odd times, special files, and something shaped like a bare repository.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use sha1::{Digest, Sha1};

use crate::chance::Chance;

/// A home under change.
pub struct Home<'a> {
    root: &'a Path,
    chance: &'a mut Chance,
    next_name: u64,
    /// Files that got a further name in this round. Nobody is told when such a file is changed through a name that was
    /// added and removed since the last look, or that is left out, so that only a look at everything finds that: it
    /// isn't done here.
    linked: std::collections::BTreeSet<u64>,
}

/// Sizes on both sides of every threshold.
const SIZES: &[usize] = &[0, 0, 1, 1, 100, 100, 4095, 4096, 4097, 20_000, 131_071, 131_072, 131_073, 300 << 10];
const LARGE: usize = 5 << 20;

impl<'a> Home<'a> {
    /// The home at `root`; `chance` decides all that follows.
    pub fn new(root: &'a Path, chance: &'a mut Chance) -> Home<'a> {
        // Names of one round are never those of another.
        let next_name = chance.below(1 << 40) << 20;
        Home { root, chance, next_name, linked: Default::default() }
    }

    /// Fills an empty root with about `count` entries.
    pub fn fill(&mut self, count: u64) {
        self.make_repository("repo.git");
        fs::create_dir(self.root.join("caches")).expect("a new folder");
        fs::write(self.root.join("caches/left out"), b"x").expect("a new file");
        for _ in 0..count {
            self.make_something();
        }
        if self.chance.happens(1, 4) {
            self.make_large();
        }
    }

    /// Changes so many things.
    pub fn change(&mut self, count: u64) {
        for _ in 0..count {
            self.change_something();
        }
    }

    fn make_something(&mut self) {
        let dir = self.some_dir();
        let path = self.fresh(&dir);
        match self.chance.below(20) {
            0..=8 => self.make_file(&path),
            9..=12 => self.make_dir(&path),
            13 => {
                let target = self.fresh_name();
                std::os::unix::fs::symlink(target, &path).expect("a new symlink");
                self.touch(&path);
            }
            14 => {
                let target = self.some(|_| true).unwrap_or_else(|| self.root.into());
                std::os::unix::fs::symlink(target, &path).expect("a new symlink");
            }
            15 | 16 => self.make_link(&path),
            17 => self.make_sparse(&path),
            18 => self.make_special(&dir),
            _ => {
                self.make_dir(&path);
                let inner = self.fresh(&path);
                self.make_file(&inner);
            }
        }
    }

    fn make_file(&mut self, path: &Path) {
        let bytes = *self.chance.pick(SIZES);
        let content = if self.chance.happens(1, 3) { vec![b'a'; bytes] } else { self.chance.bytes(bytes) };
        fs::write(path, content).expect("a new file");
        self.adorn(path);
    }

    fn make_large(&mut self) {
        let path = self.fresh(self.root);
        let content = self.chance.bytes(LARGE);
        fs::write(path, content).expect("a new file");
    }

    fn make_dir(&mut self, path: &Path) {
        fs::create_dir(path).expect("a new folder");
        self.adorn(path);
    }

    fn make_sparse(&mut self, path: &Path) {
        let mut file = File::create_new(path).expect("a new file");
        let at = self.chance.below(600 << 10);
        file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(b"after a hole")).expect("written");
        file.set_len(at + 12 + self.chance.below(300 << 10)).expect("grown");
    }

    fn make_link(&mut self, path: &Path) {
        // Objects and all else are captured at different times: a file that is both is none that git makes.
        let objects = is_below_objects(path);
        if let Some(from) = self.some(|p| is_plain_file(p) && is_below_objects(p) == objects && !may_be_left_out(p)) {
            self.linked.insert(from.metadata().expect("a file").ino());
            fs::hard_link(from, path).expect("a new link");
        }
    }

    fn make_special(&mut self, dir: &Path) {
        let path = self.fresh(dir);
        let mode = Mode::from_raw_mode(0o600);
        match self.chance.below(3) {
            0 => rustix::fs::mknodat(CWD, &path, FileType::Fifo, mode, 0).expect("a new pipe"),
            1 => {
                let mut name = self.fresh_name();
                name.push(crate::compare::EXCLUDED_SUFFIX);
                let cut = name.as_bytes()[name.len().saturating_sub(200)..].to_vec();
                fs::write(dir.join(OsString::from_vec(cut)), b"x").expect("a new file");
            }
            _ => fs::write(self.root.join("caches").join(self.plain_name()), b"x").unwrap_or_default(),
        }
    }

    fn make_repository(&mut self, name: &str) {
        let repo = self.root.join(name);
        for dir in ["", "refs", "refs/heads", "refs/tags", "objects", "objects/info", "objects/pack", "objects/ab", "hooks"] {
            fs::create_dir(repo.join(dir)).expect("a new folder");
        }
        for (path, content) in [
            ("HEAD", "ref: refs/heads/main\n"),
            ("packed-refs", "# pack-refs with: sorted \n"),
            ("config", "[core]\n"),
            ("index.lock", "transient"),
        ] {
            fs::write(repo.join(path), content).expect("a new file");
        }
        self.push_to(&repo);
    }

    /// What a push leaves, and what it leaves behind for a moment.
    fn push_to(&mut self, repo: &Path) {
        let content = self.chance.bytes(300);
        let (id, object) = loose_object(&content);
        let dir = repo.join("objects").join(&id[..2]);
        let _ = fs::create_dir(&dir);
        let _ = fs::write(dir.join(&id[2..]), object);
        // An empty pack and its index.
        let trailer = self.chance.bytes(20);
        let pack = [b"PACK\0\0\0\x02\0\0\0\0".as_slice(), &trailer].concat();
        let mut index = [b"\xfftOc\0\0\0\x02".as_slice(), &[0; 1024], &trailer].concat();
        index.extend(Sha1::digest(&index));
        for (name, content) in [(format!("pack-{id}.pack"), pack), (format!("pack-{id}.idx"), index)] {
            let _ = fs::write(repo.join("objects/pack").join(name), content);
        }
        let _ = fs::write(repo.join(format!("objects/pack/tmp_pack_{id}")), b"transient");
        let lock = repo.join("refs/heads/main.lock");
        if fs::write(&lock, format!("{id}\n")).is_ok() && self.chance.happens(3, 4) {
            let _ = fs::rename(&lock, repo.join("refs/heads/main"));
        }
    }

    fn change_something(&mut self) {
        match self.chance.below(26) {
            0..=3 => self.make_something(),
            4 => self.write_in_place(),
            5 => self.append(),
            6 => self.cut(),
            7 | 8 => self.replace(),
            9 | 10 => self.remove_file(),
            11 => self.remove_dir(),
            12 | 13 => self.rename(|p| is_plain_file(p) || p.is_symlink()),
            14 | 15 => self.rename(|p| p.is_dir() && !p.is_symlink()),
            16 | 17 => self.exchange_kind(),
            18 | 19 => {
                let dir = self.some_dir();
                let path = self.fresh(&dir);
                self.make_link(&path);
            }
            20 | 21 => {
                if let Some(path) = self.some_to_write(|p| is_dir(p) || is_plain_file(p)) {
                    self.adorn(&path);
                }
            }
            22 => {
                if let Some(path) = self.some_to_write(|_| true) {
                    self.touch(&path);
                }
            }
            23 => self.insert_at_front(),
            24 => self.unlink_one_of_several(),
            _ => {
                if let Some(repo) = self.some(|p| p.join("HEAD").exists()) {
                    self.push_to(&repo);
                }
            }
        }
    }

    fn write_in_place(&mut self) {
        let Some(path) = self.some_to_write(|p| is_plain_file(p) && size(p) > 0) else { return };
        let at = self.chance.below(size(&path));
        let mut file = OpenOptions::new().write(true).open(&path).expect("a writable file");
        file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(&[self.chance.bits() as u8])).expect("written");
        if self.chance.happens(1, 3) {
            self.touch(&path);
        }
    }

    fn append(&mut self) {
        let Some(path) = self.some_to_write(is_plain_file) else { return };
        let count = 1 + self.chance.below(5000) as usize;
        let more = self.chance.bytes(count);
        OpenOptions::new().append(true).open(path).and_then(|mut f| f.write_all(&more)).expect("appended");
    }

    fn cut(&mut self) {
        let Some(path) = self.some_to_write(is_plain_file) else { return };
        let len = self.chance.below(size(&path) + 1);
        OpenOptions::new().write(true).open(path).and_then(|f| f.set_len(len)).expect("cut");
    }

    fn replace(&mut self) {
        let Some(path) = self.some(|p| is_plain_file(p) || p.is_symlink()) else { return };
        let new = self.fresh(path.parent().expect("below the root"));
        self.make_file(&new);
        fs::rename(new, path).expect("replaced");
    }

    fn remove_file(&mut self) {
        if let Some(path) = self.some(|p| !is_dir(p)) {
            fs::remove_file(path).expect("removed");
        }
    }

    fn remove_dir(&mut self) {
        if let Some(path) = self.some(is_dir) {
            fs::remove_dir_all(path).expect("removed");
        }
    }

    fn unlink_one_of_several(&mut self) {
        if let Some(path) = self.some(|p| is_plain_file(p) && p.symlink_metadata().is_ok_and(|m| m.nlink() > 1)) {
            fs::remove_file(path).expect("removed");
        }
    }

    fn rename(&mut self, wanted: impl Fn(&Path) -> bool) {
        let Some(from) = self.some(wanted) else { return };
        let dir = self.some_dir();
        if dir.starts_with(&from) {
            return;
        }
        let existing = self.some(|p| !is_dir(p));
        let to = match existing {
            Some(to) if !is_dir(&from) && self.chance.happens(1, 3) => to,
            _ => self.fresh(&dir),
        };
        fs::rename(from, to).expect("renamed");
    }

    fn exchange_kind(&mut self) {
        let Some(path) = self.some(|p| is_dir(p) || is_plain_file(p) || p.is_symlink()) else { return };
        if is_dir(&path) {
            fs::remove_dir_all(&path).expect("removed");
        } else {
            fs::remove_file(&path).expect("removed");
        }
        match self.chance.below(3) {
            0 => self.make_file(&path),
            1 => std::os::unix::fs::symlink("nowhere", &path).expect("a new symlink"),
            _ => {
                self.make_dir(&path);
                for _ in 0..self.chance.below(3) {
                    let inner = self.fresh(&path);
                    self.make_file(&inner);
                }
            }
        }
    }

    fn insert_at_front(&mut self) {
        let Some(path) = self.some_to_write(|p| is_plain_file(p) && size(p) > 100_000) else { return };
        let mut content = vec![b'!'];
        File::open(&path).and_then(|mut f| f.read_to_end(&mut content)).expect("read");
        fs::write(path, content).expect("written");
    }

    /// Gives an entry owner, mode, attributes and time, some of them.
    fn adorn(&mut self, path: &Path) {
        let is_dir = is_dir(path);
        if self.chance.happens(1, 4) && rustix::process::geteuid().is_root() {
            let id = |chance: &mut Chance| Some(chance.below(70_000) as u32);
            std::os::unix::fs::lchown(path, id(self.chance), id(self.chance)).expect("another owner");
        }
        if self.chance.happens(1, 3) {
            let modes: &[u32] = if is_dir { &[0o700, 0o755, 0o2775, 0o1777, 0o000] } else { &[0o644, 0o600, 0o755, 0o000, 0o4755, 0o444] };
            fs::set_permissions(path, fs::Permissions::from_mode(*self.chance.pick(modes))).expect("another mode");
        }
        if self.chance.happens(1, 5) {
            let name = format!("user.n{}", self.chance.below(3));
            let count = self.chance.below(200) as usize;
            let value = self.chance.bytes(count);
            rustix::fs::setxattr(path, name, &value, XattrFlags::empty()).expect("an attribute");
        }
        if self.chance.happens(1, 12) {
            let _ = rustix::fs::removexattr(path, "user.n0");
        }
        if self.chance.happens(1, 8) {
            let acl = access_control_list(self.chance.below(1000) as u32);
            rustix::fs::setxattr(path, "system.posix_acl_access", &acl, XattrFlags::empty()).expect("an ACL");
            if is_dir {
                rustix::fs::setxattr(path, "system.posix_acl_default", &acl, XattrFlags::empty()).expect("an ACL");
            }
        }
        if self.chance.happens(1, 2) {
            self.touch(path);
        }
    }

    fn touch(&mut self, path: &Path) {
        let secs = match self.chance.below(4) {
            0 => -(self.chance.below(1 << 30) as i64),
            1 => 0,
            _ => self.chance.below(1 << 31) as i64,
        };
        let time = Timespec { tv_sec: secs, tv_nsec: self.chance.below(1_000_000_000) as i64 };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).expect("other times");
    }

    /// Something below the root for which `wanted` holds; never what only git writes.
    fn some(&mut self, wanted: impl Fn(&Path) -> bool) -> Option<PathBuf> {
        let found: Vec<_> = self.all().into_iter().filter(|p| !is_git_s(p) && wanted(p)).collect();
        (!found.is_empty()).then(|| self.chance.pick(&found).clone())
    }

    fn some_to_write(&mut self, wanted: impl Fn(&Path) -> bool) -> Option<PathBuf> {
        let linked = self.linked.clone();
        let silent = |m: &fs::Metadata, p: &Path| m.is_file() && m.nlink() > 1 && (linked.contains(&m.ino()) || may_be_left_out(p));
        self.some(|p| wanted(p) && p.symlink_metadata().is_ok_and(|m| !silent(&m, p)))
    }

    fn some_dir(&mut self) -> PathBuf {
        let mut dirs: Vec<_> = self.all().into_iter().filter(|p| is_dir(p) && !is_git_s(p) && p.as_os_str().len() < 3000).collect();
        dirs.push(self.root.into());
        self.chance.pick(&dirs).clone()
    }

    fn all(&self) -> Vec<PathBuf> {
        let walk = walkdir::WalkDir::new(self.root).min_depth(1).sort_by_file_name().into_iter();
        let own = |name: &OsStr| name == ".coldspare" || name == "caches";
        walk.filter_entry(|e| !own(e.file_name())).map(|e| e.expect("a readable home").into_path()).collect()
    }

    fn fresh(&mut self, dir: &Path) -> PathBuf {
        let name = self.fresh_name();
        dir.join(name)
    }

    fn plain_name(&mut self) -> String {
        self.next_name += 1;
        format!("n{:x}", self.next_name)
    }

    fn fresh_name(&mut self) -> OsString {
        let plain = self.plain_name();
        let mut name = plain.into_bytes();
        match self.chance.below(12) {
            0 => name.extend_from_slice(b"\xff\xfe not text"),
            1 => name.extend_from_slice(b"\nline\t\x1b[31m"),
            2 => name.resize(255, b'x'),
            3 => name.extend_from_slice(b".lock"),
            4 => name.splice(0..0, *b"tmp_").for_each(drop),
            _ => {}
        }
        OsString::from_vec(name)
    }
}

/// Waits until whatever is changed from now on has another time stamp than what was changed before.
///
/// `settle_ms` is how long ago a change has to be for the capture to trust its time.
pub fn let_clock_pass(settle_ms: u64) {
    let start = std::time::Instant::now();
    while start.elapsed().as_millis() < u128::from(settle_ms) {
        std::thread::yield_now();
    }
}

/// In the kernel's binary form (`linux/posix_acl_xattr.h`): owner, one more user, group, mask, others.
fn access_control_list(uid: u32) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let mut out = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [(0x01u16, 7u16, NOBODY), (0x02, 4, uid), (0x04, 5, NOBODY), (0x10, 5, NOBODY), (0x20, 1, NOBODY)] {
        out.extend_from_slice(&tag.to_le_bytes());
        out.extend_from_slice(&permissions.to_le_bytes());
        out.extend_from_slice(&id.to_le_bytes());
    }
    out
}

/// Whether only git writes here: what it wrote is damage when somebody else does.
fn is_git_s(path: &Path) -> bool {
    let git = ["HEAD", "objects", "refs", "packed-refs"];
    path.components().any(|c| git.iter().any(|name| c.as_os_str() == *name))
}

/// The name and the bytes of a loose blob.
fn loose_object(content: &[u8]) -> (String, Vec<u8>) {
    let plain = [format!("blob {}\0", content.len()).as_bytes(), content].concat();
    let id = Sha1::digest(&plain).iter().map(|byte| format!("{byte:02x}")).collect();
    let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&plain).expect("written to memory");
    (id, packed.finish().expect("written to memory"))
}

fn is_below_objects(path: &Path) -> bool {
    path.components().any(|c| c.as_os_str() == "objects")
}

fn may_be_left_out(path: &Path) -> bool {
    let ends = [&b".lock"[..], crate::compare::EXCLUDED_SUFFIX.as_bytes()];
    let mut names = path.components().map(|c| c.as_os_str().as_bytes());
    names.any(|name| name.starts_with(b"tmp_") || ends.iter().any(|end| name.ends_with(end)))
}

fn is_dir(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|m| m.is_dir())
}

fn is_plain_file(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|m| m.is_file() && !m.file_type().is_fifo())
}

fn size(path: &Path) -> u64 {
    path.symlink_metadata().map_or(0, |m| m.len())
}
