//! The seal of a standby: its roots are read-only for everybody but the receiver (`docs/decisions/0022-a-seal-by-a-mount.md`).
//!
//! A helper, this program once more, has the privilege that it takes, and nothing else; it seals, gives the daemon a way in
//! that stays writable, and takes the seal off when this host becomes the active. A daemon that dies leaves the seal.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use coldspare_core::control::Role;
use coldspare_os::{Capability, mounts};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType,
};
use serde_json::{Value, json};

use crate::config::Config;
use crate::exit::{Code, Failure, Outcome};
use crate::roots;
use crate::state::State;

/// The name of the hidden command.
pub(crate) const COMMAND: &str = "seal-helper";

/// What the daemon asks for.
const SEAL: u8 = b's';
const UNSEAL: u8 = b'u';
/// How an answer begins: done, or why not.
const DONE: u8 = b'k';
const FAILED: u8 = b'e';
/// LIMIT: bytes of a message.
const MESSAGE_BYTES_MAX: usize = 4096;

/// By which ways the roots are written: those that are sealed through mounts of their own, the others by their paths.
#[derive(Debug, Default)]
pub(crate) struct Ways(Vec<Option<OwnedFd>>);

/// The seal of a running standby.
#[derive(Debug)]
pub(crate) struct Seal {
    helper: Option<Mutex<Helper>>,
    paths: Vec<PathBuf>,
    pub(crate) ways: Ways,
    is_wanted: bool,
    /// Why it is not sealed though it should be.
    why: Option<String>,
    /// Whether all of this host see it, as far as that can be told.
    is_seen_by_all: Option<bool>,
}

/// The process that has the privilege; ends with its link.
#[derive(Debug)]
struct Helper {
    child: Child,
    link: OwnedFd,
}

/// What a person asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Nobody writes.
    Seal,
    /// Everybody may.
    Unseal,
}

impl Ways {
    /// The ways into roots that may be sealed, for a command that runs instead of the daemon.
    ///
    /// # Errors
    /// `Usage`: a root is sealed, and privileges are missing.
    pub(crate) fn find(paths: &[PathBuf]) -> Result<Ways, Failure> {
        let way = |path: &PathBuf| match mounts::is_sealed(path) {
            Ok(false) => Ok(None),
            Ok(true) => mounts::writable(path).map(Some).map_err(|e| needs(path, &e)),
            Err(e) => Err(needs(path, &e)),
        };
        paths.iter().map(way).collect::<Result<_, String>>().map(Ways).map_err(Failure::usage)
    }

    /// By which path root `number` is written, by this process and its children, where it isn't its own.
    pub(crate) fn path(&self, number: usize) -> Option<PathBuf> {
        let way = self.0.get(number)?.as_ref()?;
        Some(format!("/proc/{}/fd/{}", std::process::id(), way.as_raw_fd()).into())
    }
}

impl Seal {
    /// Seals the roots at `paths` where the configuration wants it, or takes a seal off that is left where it doesn't. What
    /// can't be sealed is served unsealed, and says so.
    ///
    /// To be called before privileges are given up.
    ///
    /// # Errors
    /// `Usage`: a seal is left, and privileges are missing.
    pub(crate) fn begin(config: &Config, paths: Vec<PathBuf>) -> Result<Seal, Failure> {
        let is_wanted = config.hands_off.seal;
        let mut seal = Seal { helper: None, paths, ways: Ways::default(), is_wanted, why: None, is_seen_by_all: None };
        if !is_wanted {
            seal.paths.iter().try_for_each(|path| mounts::unseal(path).map_err(|e| Failure::usage(needs(path, &e))))?;
            return Ok(seal);
        }
        let sealed = Helper::start(&seal.paths).map_err(|e| e.to_string()).and_then(|mut helper| {
            let ways = helper.seal(seal.paths.len())?;
            Ok((helper, ways))
        });
        match sealed {
            Ok((helper, ways)) => {
                (seal.helper, seal.ways) = (Some(Mutex::new(helper)), ways);
                seal.is_seen_by_all = shares_mounts_with_all();
                if seal.is_seen_by_all == Some(false) {
                    tracing::warn!("the seal is seen by this daemon's own mount namespace only: everybody else can write on the standby");
                }
                tracing::info!("sealed: only the receiver can write in the roots");
            }
            Err(why) => {
                tracing::error!(why, "the standby can't be sealed: others can write there");
                seal.ways = Ways::find(&seal.paths)?;
                seal.why = Some(why);
            }
        }
        Ok(seal)
    }

    /// Takes the seal off, so that the application can write.
    ///
    /// # Errors
    /// `Damage`, with what to do.
    pub(crate) fn take_off(&self) -> Result<(), Failure> {
        let by_helper = self.helper.as_ref().map(|helper| helper.lock().unwrap_or_else(PoisonError::into_inner).unseal());
        // The helper may be gone.
        let left = self.paths.iter().try_for_each(|path| mounts::unseal(path).map_err(|e| needs(path, &e)));
        left.map_err(|why| {
            let why = by_helper.and_then(Result::err).unwrap_or(why);
            Failure::damage(format!("the seal can't be taken off: {why}; `coldspare unseal` as root does it"))
        })
    }

    /// What `status` says of it; as the table of mounts has it now.
    pub(crate) fn to_json(&self) -> Value {
        let is_sealed = self.paths.iter().all(|path| mounts::is_sealed(path).unwrap_or(false));
        json!({
            "wanted": self.is_wanted,
            "state": if is_sealed { "sealed" } else { "open" },
            "why": self.why,
            "seen_by_all": self.is_seen_by_all.filter(|_| is_sealed),
        })
    }
}

impl Helper {
    fn start(paths: &[PathBuf]) -> std::io::Result<Helper> {
        let (link, its) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(COMMAND).args(paths).stdin(its).stdout(Stdio::null());
        Ok(Helper { child: command.spawn()?, link })
    }

    fn seal(&mut self, roots: usize) -> Result<Ways, String> {
        self.ask(SEAL)?;
        let mut ways = Vec::new();
        for _ in 0..roots {
            let way = self.answer()?.ok_or("its helper gave no way in")?;
            ways.push(Some(way));
        }
        Ok(Ways(ways))
    }

    fn unseal(&mut self) -> Result<(), String> {
        self.ask(UNSEAL)?;
        self.answer().map(drop)
    }

    fn ask(&self, what: u8) -> Result<(), String> {
        rustix::net::send(&self.link, &[what], SendFlags::NOSIGNAL).map(drop).map_err(|e| format!("its helper is gone: {e}"))
    }

    fn answer(&self) -> Result<Option<OwnedFd>, String> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut text = [0; MESSAGE_BYTES_MAX];
        let received = rustix::net::recvmsg(&self.link, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC);
        let received = received.map_err(|e| format!("its helper is gone: {e}"))?;
        let way = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut ways) => ways.next(),
            _ => None,
        });
        match text[..received.bytes].split_first() {
            Some((&DONE, _)) => Ok(way),
            Some((_, why)) => Err(String::from_utf8_lossy(why).into_owned()),
            None => Err("its helper ended".into()),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs as the helper; the daemon is at the other end of standard input.
///
/// # Errors
/// `Usage`: privileges that can't be given up, a broken link.
pub(crate) fn run_helper(paths: &[PathBuf]) -> Outcome {
    let kept = coldspare_os::keep_capabilities(&[Capability::SysAdmin]);
    kept.map_err(|e| Failure::usage(format!("privileges can't be given up: {e}")))?;
    let stdin = std::io::stdin();
    let link = stdin.as_fd();
    loop {
        let mut word = [0];
        let (count, _) = rustix::net::recv(link, &mut word, RecvFlags::empty()).map_err(Failure::usage)?;
        match (count, word[0]) {
            (0, _) => return Ok(Code::Done),
            (_, SEAL) => {
                for path in paths {
                    let way = mounts::seal(path).and_then(|()| mounts::writable(path)).map_err(|e| needs(path, &e));
                    say(link, way.as_ref().map(|way| Some(way.as_fd())).map_err(String::as_str))?;
                    if way.is_err() {
                        break;
                    }
                }
            }
            _ => {
                let done = paths.iter().try_for_each(|path| mounts::unseal(path).map_err(|e| needs(path, &e)));
                say(link, done.as_ref().map(|()| None).map_err(String::as_str))?;
            }
        }
    }
}

fn say(link: BorrowedFd<'_>, answer: Result<Option<BorrowedFd<'_>>, &str>) -> Result<(), Failure> {
    let mut text = vec![if answer.is_ok() { DONE } else { FAILED }];
    text.extend(answer.err().unwrap_or_default().bytes().take(MESSAGE_BYTES_MAX - 1));
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let ways: Vec<BorrowedFd<'_>> = answer.ok().flatten().into_iter().collect();
    if !ways.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&ways));
    }
    rustix::net::sendmsg(link, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL).map(drop).map_err(Failure::usage)
}

/// Takes a seal off that is left, by a host that isn't a standby, or whose receiver doesn't run.
///
/// # Errors
/// `Usage`: privileges are missing.
pub(crate) fn take_off(config: &Config) -> Result<(), Failure> {
    for root in &config.roots {
        // A root that isn't there has no seal.
        let Ok(path) = root.path.canonicalize() else { continue };
        mounts::unseal(&path).map_err(|e| Failure::usage(needs(&path, &e)))?;
    }
    Ok(())
}

/// Runs `seal` and `unseal`.
///
/// # Errors
/// `Usage`: not a standby, privileges are missing.
pub(crate) fn run(config_path: &Path, verb: Verb) -> Outcome {
    let config = Config::load(config_path)?;
    let state = State::at(&config.state);
    let record = state.control()?;
    if verb == Verb::Unseal {
        take_off(&config)?;
        return Ok(Code::Done);
    }
    if record.role != Role::Standby {
        return Err(Failure::usage(format!("this host is {}; only a standby is sealed", record.role.word())));
    }
    // A receiver that runs would be shut out: it seals by itself at its start.
    let _lock = state.lock()?;
    for path in roots::resolve(&config, record.cluster)? {
        mounts::seal(&path).map_err(|e| Failure::usage(needs(&path, &e)))?;
    }
    Ok(Code::Done)
}

/// Whether what is mounted here is mounted for the first process, too; `None` where that may not be asked.
fn shares_mounts_with_all() -> Option<bool> {
    let of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    Some(of("self")? == of("1")?)
}

fn needs(path: &Path, e: &std::io::Error) -> String {
    let more = if e.kind() == std::io::ErrorKind::PermissionDenied { "; it needs CAP_SYS_ADMIN" } else { "" };
    format!("{}: {e}{more}", path.display())
}
