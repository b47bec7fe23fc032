//! Some changesets of the kind that a git server makes, recorded with the blocks that the standby wrote for them.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use coldspare_core::control::{ControlRecord, SLOT_BYTES};
use coldspare_core::{ClusterId, Epoch, NodeId};
use coldspare_scan::capture::Work;
use coldspare_sim::blocklog::{Disk, Filesystem, Op};
use coldspare_sim::pair::{make_root, standby_root};
use coldspare_sim::{Chance, Pair, Sent, Setup, Tree};
use rustix::fs::XattrFlags;
use tempfile::TempDir;

/// Where the home's repositories are, while they are.
pub(crate) const REPOSITORIES: [&str; 2] = ["repositories/1", "repositories/2"];

/// One acknowledged changeset.
pub(crate) struct Step {
    /// The tree that it makes.
    pub tree: Tree,
    /// What was sent for it.
    pub sent: Sent,
}

/// All of it, with a disk that is where it was before.
pub(crate) struct Recorded {
    pub disk: Disk,
    pub ops: Vec<Op>,
    pub steps: Vec<Step>,
    /// The tree before the first changeset.
    pub empty: Tree,
}

/// Runs the changesets on an empty standby; what it wrote is in the log, every acknowledgement marked.
pub(crate) fn record(filesystem: Filesystem) -> Recorded {
    let disk = Disk::new(filesystem).unwrap();
    let mounted = disk.mount().unwrap();
    let at = disk.mount_point();
    make_root(&standby_root(at));
    rustix::fs::syncfs(File::open(at).unwrap()).unwrap();
    let empty = Tree::read(&standby_root(at));
    disk.device.record();
    let mut pair = Pair::with_standby_at(Setup::Unwatched, Path::new("/dev/shm"), at);
    let mut home = Home::new(pair.active_root());
    let mut steps = Vec::new();
    for number in 0..Home::CHANGES {
        home.change(number);
        let tree = pair.active_tree();
        promise(at, number as u64);
        // What git derives from other files is left to the next changeset while it is new.
        coldspare_sim::home::let_clock_pass(60);
        pair.follow(Work::Everything).unwrap();
        disk.device.mark(number);
        steps.push(Step { tree, sent: pair.sent().unwrap().clone() });
    }
    drop(pair);
    mounted.unmount().unwrap();
    let ops = disk.device.rewind();
    Recorded { disk, ops, steps, empty }
}

/// The active's home, and beside it a clone that pushes to it.
struct Home {
    root: PathBuf,
    work: TempDir,
    chance: Chance,
}

impl Home {
    const CHANGES: usize = 24;

    fn new(root: PathBuf) -> Home {
        let work = tempfile::tempdir_in("/dev/shm").unwrap();
        Home { root, work, chance: Chance::new(1) }
    }

    fn change(&mut self, number: usize) {
        let shared = self.root.join("shared");
        match number {
            0 => self.seed(),
            1 | 6 | 11 | 17 => self.push(1, "main"),
            2 => {
                self.write("shared/config/main.properties", 900);
                self.write("shared/a3", 5000);
            }
            3 => {
                self.git_in(REPOSITORIES[0], &["config", "receive.unpackLimit", "1"]);
                self.push(1, "packed");
            }
            4 => self.git_in(REPOSITORIES[0], &["pack-refs", "--all"]),
            5 => self.write("shared/large", 700_000),
            7 => {
                fs::remove_dir_all(shared.join("config")).unwrap();
                self.write("shared/config", 300);
            }
            8 => {
                fs::remove_file(shared.join("a1")).unwrap();
                for name in ["shared/a1/x", "shared/a1/y/z", "shared/a2.d/w"] {
                    self.write(name, 700);
                }
            }
            9 => {
                self.make_repository(1);
                self.push(2, "main");
            }
            10 => {
                for n in 0..4 {
                    fs::hard_link(shared.join(format!("a{}", 4 + n / 2)), self.root.join(format!("link{n}"))).unwrap();
                }
                fs::hard_link(shared.join("large"), self.root.join("large link")).unwrap();
            }
            12 => self.write_in("shared/large", 300_000, 3000),
            // More than are synced one by one: staged files, then touched folders.
            13 => (0..70).for_each(|n| self.write(&format!("shared/many/f{n}"), 200 + 30 * n)),
            14 => (0..70).for_each(|n| self.write(&format!("shared/tree/d{n}/f"), 100)),
            15 => {
                for n in 0..70 {
                    self.write(&format!("shared/tree/d{n}/g"), 50);
                    mode(&shared.join(format!("tree/d{n}")), 0o750);
                }
            }
            16 => self.git_in(REPOSITORIES[0], &["repack", "-a", "-d", "-q"]),
            18 => self.adorn(),
            19 => {
                fs::remove_file(self.root.join("link1")).unwrap();
                fs::rename(self.root.join("link2"), shared.join("link2")).unwrap();
                fs::rename(shared.join("many"), self.root.join("renamed")).unwrap();
            }
            20 => {
                self.git_in(REPOSITORIES[0], &["branch", "-q", "-D", "packed"]);
                self.git_in(REPOSITORIES[0], &["gc", "-q", "--prune=now"]);
            }
            21 => fs::remove_dir_all(self.root.join(REPOSITORIES[1])).unwrap(),
            22 => {
                (0..70).step_by(2).for_each(|n| fs::remove_dir_all(shared.join(format!("tree/d{n}"))).unwrap());
                (1..70).step_by(2).for_each(|n| fs::remove_file(shared.join(format!("tree/d{n}/f"))).unwrap());
            }
            23 => {
                self.push(1, "last");
                self.write("shared/a2", 40_000);
                fs::remove_file(shared.join("a3")).unwrap();
            }
            _ => unreachable!("no such change"),
        }
    }

    fn seed(&mut self) {
        for n in 0..20 {
            let bytes = 10 + 400 * n;
            self.write(&format!("shared/a{n}"), bytes);
        }
        self.write("shared/config/main.properties", 800);
        self.write("shared/config/more/deep", 80);
        self.write("log/today", 150_000);
        fs::create_dir_all(self.root.join("empty/er")).unwrap();
        self.make_repository(0);
        self.push(1, "main");
    }

    fn make_repository(&mut self, index: usize) {
        let path = self.root.join(REPOSITORIES[index]);
        fs::create_dir_all(&path).unwrap();
        git(&path, &["init", "-q", "--bare", "--template=", "--initial-branch=main"]).unwrap();
        for (name, value) in [("gc.auto", "0"), ("receive.autogc", "false"), ("core.logAllRefUpdates", "true")] {
            git(&path, &["config", name, value]).unwrap();
        }
        let clone = self.clone_of(index + 1);
        fs::create_dir_all(&clone).unwrap();
        git(&clone, &["init", "-q", "--template=", "--initial-branch=main"]).unwrap();
        git(&clone, &["config", "gc.auto", "0"]).unwrap();
    }

    fn clone_of(&self, number: usize) -> PathBuf {
        self.work.path().join(number.to_string())
    }

    /// Commits something and pushes it to the branch of repository `number`.
    fn push(&mut self, number: usize, branch: &str) {
        let clone = self.clone_of(number);
        for name in ["a", "b/c"] {
            let path = clone.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, self.chance.bytes(600)).unwrap();
        }
        git(&clone, &["add", "."]).unwrap();
        git(&clone, &["commit", "-q", "-m", "a change"]).unwrap();
        let to = self.root.join(REPOSITORIES[number - 1]);
        git(&clone, &["push", "-q", to.to_str().unwrap(), &format!("HEAD:refs/heads/{branch}")]).unwrap();
    }

    fn git_in(&self, repository: &str, arguments: &[&str]) {
        git(&self.root.join(repository), arguments).unwrap();
    }

    fn write(&mut self, name: &str, bytes: usize) {
        let path = self.root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, self.chance.bytes(bytes)).unwrap();
    }

    fn write_in(&mut self, name: &str, at: u64, bytes: usize) {
        let file = OpenOptions::new().write(true).open(self.root.join(name)).unwrap();
        file.write_all_at(&self.chance.bytes(bytes), at).unwrap();
    }

    /// Attributes of files and folders, links, and a link that becomes a file.
    fn adorn(&mut self) {
        let shared = self.root.join("shared");
        for n in 8..14 {
            let path = shared.join(format!("a{n}"));
            mode(&path, 0o640 + n);
            rustix::fs::setxattr(&path, "user.note", &self.chance.bytes(60), XattrFlags::empty()).unwrap();
        }
        mode(&self.root.join("empty"), 0o700);
        for n in 0..3 {
            symlink(format!("a{n}"), shared.join(format!("symlink{n}"))).unwrap();
        }
        std::os::unix::fs::chown(shared.join("a15"), Some(1234), Some(4321)).unwrap();
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

/// Runs git by itself, whatever the user's settings; what it said when it failed.
pub(crate) fn git(dir: &Path, arguments: &[&str]) -> Result<(), String> {
    let mut command = Command::new("git");
    command.args(arguments).current_dir(dir);
    for (name, value) in [
        ("GIT_CONFIG_GLOBAL", "/dev/null"),
        ("GIT_CONFIG_SYSTEM", "/dev/null"),
        ("GIT_AUTHOR_NAME", "A"),
        ("GIT_AUTHOR_EMAIL", "a@example.org"),
        ("GIT_COMMITTER_NAME", "A"),
        ("GIT_COMMITTER_EMAIL", "a@example.org"),
        ("GIT_AUTHOR_DATE", "1700000000 +0000"),
        ("GIT_COMMITTER_DATE", "1700000000 +0000"),
    ] {
        command.env(name, value);
    }
    let out = command.output().map_err(|e| e.to_string())?;
    let said = || [String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr)].concat();
    if out.status.success() { Ok(()) } else { Err(format!("git {}: {}", arguments.join(" "), said())) }
}

/// A control record beside the store.
pub(crate) fn control_path(at: &Path) -> PathBuf {
    at.join("control")
}

/// Promises `epoch` durably, as `docs/formats.md` says.
fn promise(at: &Path, epoch: u64) {
    let path = control_path(at);
    let (cluster, node) = (ClusterId([1; 16]), NodeId([2; 16]));
    let record = ControlRecord { promised: Epoch(epoch), ..ControlRecord::standby(cluster, node) };
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).unwrap();
    let next = epoch + 1;
    file.write_all_at(&record.encode_slot(next), (next % 2) * SLOT_BYTES as u64).unwrap();
    file.sync_all().unwrap();
    File::open(at).unwrap().sync_all().unwrap();
}

/// The highest promise that can be read.
pub(crate) fn promised(path: &Path) -> Option<u64> {
    let bytes = fs::read(path).ok()?;
    bytes.chunks(SLOT_BYTES).filter_map(ControlRecord::decode_slot).max_by_key(|(n, _)| *n).map(|(_, record)| record.promised.0)
}
