//! What a test can do to a disk from outside: watch calls, be told of changes, make calls fail.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::ModelDisk;
use super::image::Id;

/// One call of [`Disk`](coldspare_os::Disk) that is about to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The method's name.
    pub name: &'static str,
    /// What it does.
    pub kind: CallKind,
    /// How many calls came before.
    pub number: u64,
}

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallKind {
    /// It changes nothing.
    Looks,
    /// It changes something that the next crash may undo.
    Changes,
    /// It makes something durable.
    Syncs,
}

/// Something that was changed, as inotify would tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Absolute, in the disk's own tree.
    pub path: Vec<u8>,
    /// What happened to it.
    pub kind: ChangeKind,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// As fanotify would tell it.
    pub spot: Spot,
}

/// A name in a directory, wherever that is by now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spot {
    pub(super) dir: Id,
    pub(super) name: Box<[u8]>,
}

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangeKind {
    /// It is new here; also what a rename brought.
    Appeared,
    /// It is gone from here; also what a rename took away.
    Vanished,
    /// Other bytes.
    Content,
    /// Other owner, mode, time or attributes.
    Attributes,
}

/// A sync that a test may leave out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SyncCall<'a> {
    /// The method's name.
    pub name: &'static str,
    /// What is synced, absolute, by the name that it was opened by.
    pub path: &'a [u8],
    /// How many syncs came before, of all names.
    pub number: u64,
}

/// Calls that are to fail.
#[derive(Clone, Copy)]
pub struct Fault {
    /// Which calls count.
    pub on: fn(&Call) -> bool,
    /// How many of them still succeed.
    pub after: u64,
    /// How many fail then; the fault is over after them.
    pub times: u64,
    /// With which error of the kernel.
    pub errno: i32,
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fault { after, times, errno, .. } = self;
        write!(f, "Fault {{ after: {after}, times: {times}, errno: {errno} }}")
    }
}

pub(super) type CallHook = Arc<dyn Fn(&ModelDisk, &Call) + Send + Sync>;
pub(super) type ChangeHook = Arc<dyn Fn(&Change) + Send + Sync>;

/// All of it, behind one lock.
#[derive(Default)]
pub(super) struct Interference {
    pub(super) calls: u64,
    pub(super) faults: Vec<Fault>,
    syncs: u64,
    pub(super) skipped: Option<fn(&SyncCall<'_>) -> bool>,
    pub(super) on_call: Option<CallHook>,
    pub(super) on_change: Option<ChangeHook>,
}

impl Interference {
    /// Counts a call, and the error that it is to have.
    pub(super) fn count(&mut self, name: &'static str, kind: CallKind) -> (Call, io::Result<()>) {
        let call = Call { name, kind, number: self.calls };
        self.calls += 1;
        let mut result = Ok(());
        for fault in self.faults.iter_mut().filter(|f| (f.on)(&call)) {
            if fault.after > 0 {
                fault.after -= 1;
            } else if fault.times > 0 && result.is_ok() {
                fault.times -= 1;
                result = Err(io::Error::from_raw_os_error(fault.errno));
            }
        }
        self.faults.retain(|f| f.times > 0);
        (call, result)
    }
}

impl Interference {
    pub(super) fn is_skipped(&mut self, name: &'static str, path: &[u8]) -> bool {
        let sync = SyncCall { name, path, number: self.syncs };
        self.syncs += 1;
        self.skipped.is_some_and(|which| which(&sync))
    }
}

impl fmt::Debug for Interference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Interference {{ calls: {}, faults: {:?} }}", self.calls, self.faults)
    }
}
