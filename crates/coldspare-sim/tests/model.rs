//! The model of a disk against the kernel's: the same operations give the same results and the same tree.

use std::io;
use std::path::Path;

use coldspare_os::{Attributes, Disk, FileKind, RealDisk, Stat};
use coldspare_sim::Chance;
use coldspare_sim::model::{Call, CallKind, Change, ChangeKind, Fault, ModelDisk};

/// What a call said, as far as both disks have to agree.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Said {
    Done,
    Bytes(Vec<u8>),
    Names(Vec<(Vec<u8>, FileKind)>),
    Seen {
        kind: FileKind,
        mode: u16,
        size: u64,
        nlink: u32,
        mtime: Option<(i64, u32)>,
    },
    /// The kernel's number, or the kind of an error of ours.
    Failed(Result<i32, io::ErrorKind>),
}

/// One disk with a few handles, some on what was removed meanwhile.
struct Bench<D: Disk> {
    disk: D,
    dirs: Vec<D::Dir>,
    files: Vec<D::File>,
}

impl<D: Disk> Bench<D> {
    fn new(disk: D, root: &Path) -> Bench<D> {
        let dirs = vec![disk.open_root(root).expect("a root")];
        Bench { disk, dirs, files: Vec::new() }
    }

    /// The operation that `chance` picks.
    fn step(&mut self, chance: &mut Chance) -> (String, Said) {
        let (disk, dirs) = (&self.disk, &self.dirs);
        let pick = |chance: &mut Chance| chance.below(dirs.len() as u64) as usize;
        let (a, b) = (pick(chance), pick(chance));
        let (n, m) = (name(chance), name(chance));
        let (dir, other) = (&dirs[a], &dirs[b]);
        let call = chance.below(26);
        let mut text = format!("{call}: {a} {} {b} {}", n.escape_ascii(), m.escape_ascii());
        let said = match call {
            0 | 1 => match disk.create_file(dir, &n) {
                Ok(file) => {
                    self.files.push(file);
                    Said::Done
                }
                Err(e) => failed(e),
            },
            2..=4 => done(disk.create_dir(dir, &n)),
            5 => {
                let targets = [&b"nowhere"[..], b"a", b"", b"a\0b", &[b'x'; 4095], &[b'x'; 4096]];
                let target: &&[u8] = chance.pick(&targets);
                done(disk.symlink(target, dir, &n))
            }
            6 | 7 => done(disk.link(dir, &n, other, &m)),
            8..=10 => done(disk.rename(dir, &n, other, &m)),
            11 => done(disk.exchange(dir, &n, other, &m)),
            12 => done(disk.remove_file(dir, &n)),
            13 => done(disk.remove_dir(dir, &n)),
            14 => said(disk.stat(dir, &n), |stat| seen(&stat, false)),
            15 => said(disk.list(dir), |names| {
                let mut names: Vec<_> = names.into_iter().map(|l| (l.name.to_vec(), l.kind)).collect();
                names.sort_by(|a, b| a.0.cmp(&b.0));
                Said::Names(names)
            }),
            16 => said(disk.read_link(dir, &n), Said::Bytes),
            17 | 18 => {
                let path = if chance.happens(1, 3) { [&n, b"/".as_slice(), &m].concat() } else { n.clone() };
                match disk.open_dir(dir, &path) {
                    Ok(dir) => {
                        self.dirs.push(dir);
                        Said::Done
                    }
                    Err(e) => failed(e),
                }
            }
            19 => match disk.open_file(dir, &n) {
                Ok(file) => {
                    self.files.push(file);
                    Said::Done
                }
                Err(e) => failed(e),
            },
            20 => {
                let all: [(&[u8], &[u8]); 3] = [(b"user.a", b"1"), (b"user.b", b""), (b"user.c", b"3")];
                let xattrs = &all[..chance.below(4) as usize];
                let mode = *chance.pick(&[0o644, 0o755, 0o600, 0o7777, 0o10000]);
                let mtime = (chance.below(2_000_000_000) as i64 - 1_000, *chance.pick(&[0, 999_999_999, 1_000_000_000]));
                let attributes = Attributes { mode, uid: id(), gid: id(), mtime, xattrs };
                said(disk.set_attributes(dir, &n, &attributes), |stat| seen(&stat, true))
            }
            21 => said(disk.xattrs(dir, &n), |xattrs| {
                let own = xattrs.into_iter().filter(|(name, _)| name.starts_with(b"user."));
                Said::Bytes(own.flat_map(|(name, value)| [name, value].concat()).collect())
            }),
            _ if self.files.is_empty() => Said::Done,
            _ => {
                let (f, g) = (chance.below(self.files.len() as u64) as usize, chance.below(self.files.len() as u64) as usize);
                text = format!("{call}: file {f} {g}");
                self.content(call, f, g, chance)
            }
        };
        (text, said)
    }

    fn content(&self, call: u64, f: usize, g: usize, chance: &mut Chance) -> Said {
        let (disk, file) = (&self.disk, &self.files[f]);
        let at = *chance.pick(&[0, 1, 100, 4095, 4096, 9000]);
        match call {
            22 => {
                let count = *chance.pick(&[0usize, 1, 100, 5000]);
                done(disk.write_at(file, at, &chance.bytes(count)))
            }
            23 => done(disk.set_len(file, *chance.pick(&[0, 10, 4096, 20_000, u64::MAX]))),
            24 if f != g => done(disk.copy_range(file, at, &self.files[g], *chance.pick(&[0, 50, 8192]), *chance.pick(&[0, 1, 5000]))),
            _ => {
                let mut buf = vec![0; *chance.pick(&[0usize, 10, 10_000])];
                let stat = disk.stat_file(file).expect("a stat");
                assert!(stat.blocks == 0 || stat.size > 0 || stat.blocks > 0);
                said(disk.read_at(file, at, &mut buf), |count| Said::Bytes(buf[..count].to_vec()))
            }
        }
    }

    /// All that is below the root, and its content.
    fn tree(&self) -> Vec<(Vec<u8>, Said, Vec<u8>)> {
        let mut out = Vec::new();
        let mut rest = vec![Vec::new()];
        while let Some(path) = rest.pop() {
            let dir = self.disk.open_dir(&self.dirs[0], &path).expect("a directory");
            let mut listed = self.disk.list_stat(&dir).expect("a listing");
            listed.sort_by(|a, b| a.0.cmp(&b.0));
            for (name, stat) in listed {
                let below = if path.is_empty() { name.to_vec() } else { [&path, b"/".as_slice(), &name].concat() };
                let content = match stat.kind {
                    FileKind::File => {
                        let mut buf = vec![0; stat.size as usize];
                        let file = self.disk.open_file(&dir, &name).expect("a file");
                        assert_eq!(self.disk.read_at(&file, 0, &mut buf).expect("read"), buf.len());
                        buf
                    }
                    FileKind::Symlink => self.disk.read_link(&dir, &name).expect("a target"),
                    _ => Vec::new(),
                };
                if stat.kind == FileKind::Dir {
                    rest.push(below.clone());
                }
                out.push((below, seen(&stat, false), content));
            }
        }
        out
    }
}

fn name(chance: &mut Chance) -> Vec<u8> {
    let odd: &[&[u8]] = &[b"", b".", b"..", b"a/b", b"a\0", &[b'x'; 255], &[b'x'; 256]];
    if chance.happens(1, 25) { chance.pick(odd).to_vec() } else { vec![b'a' + chance.below(5) as u8] }
}

fn id() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn failed(e: io::Error) -> Said {
    Said::Failed(e.raw_os_error().ok_or(e.kind()))
}

fn done(result: io::Result<()>) -> Said {
    said(result, |()| Said::Done)
}

fn said<T>(result: io::Result<T>, take: impl FnOnce(T) -> Said) -> Said {
    result.map_or_else(failed, take)
}

fn seen(stat: &Stat, was_set: bool) -> Said {
    let is_dir = stat.kind == FileKind::Dir;
    // How directories count their size and names is the filesystem's own affair.
    let (size, nlink) = if is_dir { (0, 0) } else { (stat.size, stat.nlink) };
    let mode = if stat.kind == FileKind::Symlink { 0o777 } else { stat.mode };
    Said::Seen { kind: stat.kind, mode, size, nlink, mtime: was_set.then_some(stat.mtime) }
}

#[test]
fn the_model_answers_as_the_kernel_does() {
    let seeds = std::env::var("COLDSPARE_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(150);
    for seed in 0..seeds {
        let place = tempfile::tempdir_in(coldspare_sim::pair::place(seed)).expect("a folder");
        let model = ModelDisk::new();
        model.make_dirs("/root");
        let mut real = Bench::new(RealDisk::staying(), place.path());
        let mut model = Bench::new(model, Path::new("/root"));
        let (mut for_real, mut for_model) = (Chance::new(seed), Chance::new(seed));
        for step in 0..300 {
            let (text, expected) = real.step(&mut for_real);
            let (_, found) = model.step(&mut for_model);
            assert_eq!(found, expected, "seed {seed}, step {step}, {text}");
        }
        assert_eq!(model.tree(), real.tree(), "seed {seed}");
    }
}

#[test]
fn hooks_see_calls_and_changes_and_interleave() {
    let disk = ModelDisk::new();
    disk.make_dirs("/home/repo");
    let told = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let tell = told.clone();
    disk.on_change(move |change: &Change| tell.lock().expect("no panic").push((change.path.clone(), change.kind)));
    disk.on_call(|disk, call: &Call| {
        if call.name == "stat" {
            disk.write("/home/repo/HEAD", b"ref").expect("written");
        }
    });
    let repo = disk.open_root(Path::new("/home/repo")).expect("a root");
    assert_eq!(disk.stat(&repo, b"HEAD").expect("just written").size, 3);
    disk.leave_alone();
    disk.remove("/home").expect("removed");
    let head = b"/home/repo/HEAD".to_vec();
    assert_eq!(*told.lock().expect("no panic"), [(head.clone(), ChangeKind::Appeared), (head, ChangeKind::Content)]);
    assert_eq!(disk.list(&repo).map_err(|e| e.kind()), Err(io::ErrorKind::NotFound));
}

#[test]
fn faults_and_room_end_calls_with_their_errors() {
    let disk = ModelDisk::new();
    let root = disk.open_root(Path::new("/")).expect("a root");
    disk.fail(Fault { on: |call| call.kind == CallKind::Changes, after: 1, times: 1, errno: 5 });
    disk.create_dir(&root, b"a").expect("the first");
    assert_eq!(disk.create_dir(&root, b"b").map_err(|e| e.raw_os_error()), Err(Some(5)));
    disk.create_dir(&root, b"b").expect("the third");
    let (bytes, inodes) = disk.used();
    disk.set_room(bytes + 8192, inodes + 1);
    let file = disk.create_file(&root, b"f").expect("the last inode");
    assert_eq!(disk.create_dir(&root, b"c").map_err(|e| e.kind()), Err(io::ErrorKind::StorageFull));
    disk.write_at(&file, 0, &[1; 8192]).expect("it fits");
    assert_eq!(disk.write_at(&file, 8192, &[1]).map_err(|e| e.kind()), Err(io::ErrorKind::StorageFull));
    assert_eq!(disk.space(&root).map(|s| (s.free_bytes, s.free_inodes)).expect("space"), (0, 0));
    drop(file);
    disk.remove_file(&root, b"f").expect("removed");
    assert_eq!(disk.used(), (bytes, inodes));
}
