//! Homes made by a seed: the same seed makes the same names and bytes.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use flate2::Compression;
use flate2::write::ZlibEncoder;
use sha1::{Digest, Sha1};

/// What every home is made from.
pub(crate) const SEED: u64 = 20;

/// What a home holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Made {
    pub(crate) files: u64,
    pub(crate) bytes: u64,
}

/// Makes `files` loose objects in repositories of at most 60,000, with what a bare repository has besides.
pub(crate) fn make_loose(dir: &Path, files: u64, seed: u64) -> io::Result<Made> {
    let mut maker = Maker::new(seed);
    let repositories = files.div_ceil(LOOSE_PER_REPOSITORY).max(1);
    for id in 1..=repositories {
        let repository = dir.join("shared/data/repositories").join(id.to_string());
        maker.repository(&repository, id)?;
        for _ in 0..(files / repositories + u64::from(id <= files % repositories)) {
            let size = maker.log_uniform(50, 8 << 10);
            maker.loose_blob(&repository, size)?;
        }
    }
    maker.around(dir)?;
    Ok(maker.made)
}

/// Makes about `bytes` of packs in eight repositories.
pub(crate) fn make_packed(dir: &Path, bytes: u64, seed: u64) -> io::Result<Made> {
    let mut maker = Maker::new(seed);
    for id in 1..=8 {
        let repository = dir.join("shared/data/repositories").join(id.to_string());
        maker.repository(&repository, id)?;
        // Of each repository's eighth one large pack and three small ones.
        for part in [20, 6, 3, 1] {
            maker.pack(&repository, bytes / 8 * part / 30)?;
        }
    }
    maker.around(dir)?;
    Ok(maker.made)
}

/// Makes one file of `bytes` that don't shrink.
pub(crate) fn make_noise(path: &Path, bytes: u64, seed: u64) -> io::Result<()> {
    let (mut maker, mut file) = (Maker::new(seed), File::create(path)?);
    let mut buffer = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let now = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        maker.fill(&mut buffer[..now]);
        file.write_all(&buffer[..now])?;
        left -= now as u64;
    }
    Ok(())
}

/// Makes about `entries` entries, three of ten of them folders, with small files.
pub(crate) fn make_wide(dir: &Path, entries: u64, seed: u64) -> io::Result<Made> {
    let mut maker = Maker::new(seed);
    let folders = entries * 3 / 10;
    let files = entries - folders;
    for no in 0..folders {
        let folder = dir.join(format!("shared/data/attachments/repository/{}/{}", no / 1000, no % 1000));
        fs::create_dir_all(&folder)?;
        for file in 0..(files / folders + u64::from(no < files % folders)) {
            maker.file(&folder.join(format!("{file}.txt")), 100)?;
        }
    }
    Ok(maker.made)
}

struct Maker {
    state: u64,
    made: Made,
}

impl Maker {
    fn new(seed: u64) -> Maker {
        Maker { state: seed, made: Made { files: 0, bytes: 0 } }
    }

    /// What a bare repository holds besides its objects.
    fn repository(&mut self, dir: &Path, id: u64) -> io::Result<()> {
        for name in ["objects/info", "objects/pack", "refs/heads/feature", "refs/tags", "stash-refs", "info", "hooks"] {
            fs::create_dir_all(dir.join(name))?;
        }
        self.text(&dir.join("HEAD"), "ref: refs/heads/main\n")?;
        self.text(&dir.join("config"), "[core]\n\trepositoryformatversion = 0\n\tbare = true\n")?;
        self.text(&dir.join("description"), &format!("repository {id}\n"))?;
        self.text(&dir.join("repository-config"), &format!("[bitbucket]\n\tid = {id}\n"))?;
        for fan in 0..=255u8 {
            fs::create_dir(dir.join(format!("objects/{fan:02x}")))?;
        }
        let tree = self.object(dir, "tree", b"")?;
        let author = "A <a@b.c> 1767225600 +0000";
        let tip = self.object(dir, "commit", format!("tree {tree}\nauthor {author}\ncommitter {author}\n\n{id}\n").as_bytes())?;
        let mut packed_refs = String::from("# pack-refs with: peeled fully-peeled sorted\n");
        for no in 0..500 {
            packed_refs.push_str(&format!("{tip} refs/tags/v{no:04}\n"));
        }
        self.text(&dir.join("packed-refs"), &packed_refs)?;
        for no in 0..50 {
            self.text(&dir.join(format!("refs/heads/feature/{no:03}")), &format!("{tip}\n"))?;
        }
        Ok(())
    }

    /// What a home holds besides its repositories.
    fn around(&mut self, dir: &Path) -> io::Result<()> {
        let attachments = dir.join("shared/data/attachments/repository/1");
        fs::create_dir_all(&attachments)?;
        self.text(&dir.join("shared/bitbucket.properties"), "jdbc.driver=org.postgresql.Driver\n")?;
        for no in 0..20 {
            self.file(&attachments.join(format!("{no:02}.png")), 30_000)?;
        }
        Ok(())
    }

    fn text(&mut self, path: &Path, text: &str) -> io::Result<()> {
        self.made.files += 1;
        self.made.bytes += text.len() as u64;
        fs::write(path, text)
    }

    /// Writes a file of `size` bytes that don't compress.
    fn file(&mut self, path: &Path, size: u64) -> io::Result<()> {
        let mut file = File::create(path)?;
        let mut content = vec![0; size as usize];
        self.fill(&mut content);
        file.write_all(&content)?;
        self.made.files += 1;
        self.made.bytes += size;
        Ok(())
    }

    /// Writes a loose object; its name.
    fn object(&mut self, repository: &Path, kind: &str, content: &[u8]) -> io::Result<String> {
        let plain = [format!("{kind} {}\0", content.len()).as_bytes(), content].concat();
        let name: String = Sha1::digest(&plain).iter().map(|byte| format!("{byte:02x}")).collect();
        let mut file = ZlibEncoder::new(Vec::new(), Compression::fast());
        file.write_all(&plain)?;
        let file = file.finish()?;
        self.made.files += 1;
        self.made.bytes += file.len() as u64;
        fs::write(repository.join("objects").join(&name[..2]).join(&name[2..]), file)?;
        Ok(name)
    }

    /// Writes a loose object of `size` bytes that don't compress.
    fn loose_blob(&mut self, repository: &Path, size: u64) -> io::Result<()> {
        let mut content = vec![0; size as usize];
        self.fill(&mut content);
        self.object(repository, "blob", &content).map(drop)
    }

    /// Writes a pack of blobs that don't compress, of `size` bytes together, by git.
    fn pack(&mut self, repository: &Path, size: u64) -> io::Result<()> {
        let mut import = git(repository);
        import.args(["-c", "core.compression=0", "-c", "fastimport.unpackLimit=0", "fast-import", "--quiet", "--depth=0"]);
        let mut import = import.stdin(Stdio::piped()).spawn()?;
        let mut pipe = io::BufWriter::new(import.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?);
        let mut left = size;
        while left > 0 {
            let mut content = vec![0; self.log_uniform(1 << 10, 256 << 10).min(left) as usize];
            self.fill(&mut content);
            write!(pipe, "blob\ndata {}\n", content.len())?;
            pipe.write_all(&content)?;
            writeln!(pipe)?;
            left -= content.len() as u64;
        }
        drop(pipe);
        if !import.wait()?.success() {
            return Err(io::Error::other("git fast-import failed"));
        }
        self.made.files += 2;
        self.made.bytes += size;
        Ok(())
    }

    /// Fills a buffer with random bytes.
    fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_mut(8) {
            let random = self.random().to_le_bytes();
            word.copy_from_slice(&random[..word.len()]);
        }
    }

    /// A size whose logarithm is evenly distributed.
    fn log_uniform(&mut self, low: u64, high: u64) -> u64 {
        let part = (self.random() >> 11) as f64 / (1u64 << 53) as f64;
        let (low, high) = ((low as f64).ln(), (high as f64).ln());
        (low + part * (high - low)).exp() as u64
    }

    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// git collects loose objects long before; a repository under load between two collections has this many.
const LOOSE_PER_REPOSITORY: u64 = 60_000;

fn git(repository: &Path) -> Command {
    let mut command = Command::new("git");
    command.arg("-C").arg(repository);
    command
}
