import contextlib
import errno
import gc
import gzip
import io
import os
import pathlib
import re
import shutil
import stat
import struct
import tarfile
import warnings
import zipfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from proxy_nca_jax.datasets import archives

_CONTENT = np.random.default_rng(0).bytes(300_000)
_OTHER = np.random.default_rng(1).bytes(300_000)


_IMAGE = np.random.default_rng(2).bytes(3000)


def _make_zip(path, *members):
  """Members are (name or ZipInfo, content)."""
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for info, content in members:
      with warnings.catch_warnings(action='ignore'):  # About duplicate names.
        archive.writestr(info, content)


def _make_tar(path, *members, mode='w:gz', **options):
  """Members are (name or TarInfo, content)."""
  with tarfile.open(path, mode, **options) as archive:
    for info, content in members:
      if isinstance(info, str):
        info = tarfile.TarInfo(info)
      info.size = info.size or len(content)
      archive.addfile(info, io.BytesIO(content))


def _tar_info(name, kind, linkname='', **fields):
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, linkname
  for field, value in fields.items():
    setattr(info, field, value)
  return info


def _zip_info(name, mode=0, **fields):
  info = zipfile.ZipInfo(name)
  info.external_attr = mode << 16
  for field, value in fields.items():
    setattr(info, field, value)
  return info


# Unsafe names, in an archive that also contains 'a/taken.txt'.
_BAD_NAMES = (
  ('../out.txt', 'leads outside'),
  ('a/../../out.txt', 'leads outside'),
  ('a/..', 'leads outside'),
  ('..\\out.txt', 'leads outside'),
  ('a\\..\\..\\out.txt', 'leads outside'),
  ('/tmp/out.txt', 'absolute'),
  ('\\out.txt', 'absolute'),
  ('C:\\out.txt', 'absolute'),
  ('c:out.txt', 'absolute'),
  ('a/nul\0.txt', 'not a name'),
  ('.', 'File exists'),
  ('a/taken.txt', 'File exists'),
  ('a\\taken.txt', 'File exists'),
  ('./a//./taken.txt', 'File exists'),
  ('a', 'File exists'),
  ('a/taken.txt/below.txt', 'File exists'),
  ('a/taken.txt/below/below.txt', 'Not a directory'),
  ('n' * 300, 'File name too long'),
  ('d/' * 1500 + 'x', 'too deep'),
)


class ExtractTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.base = pathlib.Path(self.create_tempdir().full_path)
    self.out = self.base / 'room' / 'out'
    self.out.parent.mkdir()
    self.zip = self.base / 'a.zip'
    self.tar = self.base / 'a.tgz'

  def _extract(self, *paths):
    archives.extract([str(path) for path in paths], str(self.out))
    self.assertEqual(os.listdir(self.out.parent), ['out'])
    return {
      str(path.relative_to(self.out)): path.read_bytes()
      for path in self.out.rglob('*')
      if path.is_file()
    }

  def _check_fails(self, message, *paths):
    before = {path for path in self.base.rglob('*')}
    with self.assertRaisesRegex(ValueError, message) as caught:
      self._extract(*paths)
    self.assertEqual({path for path in self.base.rglob('*')}, before)
    return str(caught.exception)

  @parameterized.parameters('w', 'w:gz')
  def test_tar_members_arrive_whole_under_any_suffix(self, mode):
    path = self.base / 'archive.zip'
    members = [('a/b/1.jpg', _IMAGE), ('a/._1.jpg', b''), ('./c', b'c')]
    folder = _tar_info('a/empty', tarfile.DIRTYPE, mode=0o700)
    _make_tar(path, *members, (folder, b''), (folder, b''), mode=mode)
    self.assertEqual(
      self._extract(path), {'a/b/1.jpg': _IMAGE, 'a/._1.jpg': b'', 'c': b'c'}
    )
    self.assertTrue((self.out / 'a' / 'empty').is_dir())

  def test_zip_members_arrive_whole_under_any_suffix(self):
    path = self.base / 'archive.tgz'
    _make_zip(
      path,
      ('a/b/1.jpg', _IMAGE),
      ('a\\b\\2.jpg', b'2'),
      ('__MACOSX/x', b''),
      ('a/empty/', b''),
      ('a\\also\\', b''),
      (_zip_info('plain', stat.S_IFREG | 0o4777), b'p'),
    )
    self.assertEqual(
      self._extract(path),
      {
        'a/b/1.jpg': _IMAGE,
        'a/b/2.jpg': b'2',
        '__MACOSX/x': b'',
        'plain': b'p',
      },
    )
    self.assertTrue((self.out / 'a' / 'empty').is_dir())
    self.assertTrue((self.out / 'a' / 'also').is_dir())

  def test_members_larger_than_a_chunk_arrive_whole(self):
    large = _CONTENT * 10
    self.assertGreater(len(large), 2 * archives._CHUNK)
    _make_tar(self.tar, ('large', large))
    _make_zip(self.zip, ('large too', large))
    contents = self._extract(self.tar, self.zip)
    self.assertEqual(contents, {'large': large, 'large too': large})

  def test_a_tar_that_ends_in_a_zip_is_a_tar(self):
    _make_zip(self.zip, ('inner', b'x'))
    path = self.base / 'a.tar'
    _make_tar(
      path,
      ('img.zip', self.zip.read_bytes()),
      mode='w',
      format=tarfile.USTAR_FORMAT,
    )
    self.assertTrue(zipfile.is_zipfile(path))
    self.assertEqual(self._extract(path), {'img.zip': self.zip.read_bytes()})

  def test_long_and_foreign_names_are_kept(self):
    name = 'ordner/' + 'ä' * 100 + '.jpg'
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
      _make_tar(self.tar, (f'{number}' + name, b'x'), format=form)
      self.assertEqual(self._extract(self.tar), {f'{number}' + name: b'x'})
      shutil.rmtree(self.out)
    _make_zip(self.zip, (name, b'x'))
    self.assertEqual(self._extract(self.zip), {name: b'x'})

  def test_archives_and_annotations_are_extracted_side_by_side(self):
    _make_tar(self.tar, ('car_ims/1.jpg', _IMAGE))
    _make_zip(self.zip, ('devkit/meta', b'm'))
    annotations = self.base / 'cars_annos.MAT'
    annotations.write_bytes(b'MATLAB 5.0 MAT-file' + bytes(1000))
    empty = self.base / 'empty.txt'
    empty.write_bytes(b'')
    self.assertEqual(
      self._extract(self.tar, self.zip, annotations, empty),
      {
        'car_ims/1.jpg': _IMAGE,
        'devkit/meta': b'm',
        'cars_annos.MAT': annotations.read_bytes(),
        'empty.txt': b'',
      },
    )

  def test_two_archives_do_not_overwrite_each_other(self):
    _make_tar(self.tar, ('a/x', b'1'))
    _make_zip(self.zip, ('a/x', b'2'))
    message = r"a\.zip .* .1 unsafe .* 'a/x' \(File exists\)"
    self._check_fails(message, self.tar, self.zip)

  def test_permissions_owners_and_times_are_those_of_new_files(self):
    info = tarfile.TarInfo('x')
    info.mode, info.mtime, info.uid = 0o6777, 1, 12345
    _make_tar(self.tar, (info, b'x'))
    self.addCleanup(os.umask, os.umask(0o027))
    self._extract(self.tar)
    status = os.stat(self.out / 'x')
    self.assertEqual(stat.S_IMODE(status.st_mode), 0o640)
    self.assertEqual(status.st_uid, os.getuid())
    self.assertGreater(status.st_mtime, 1e9)

  @parameterized.parameters(*_BAD_NAMES)
  def test_an_unsafe_name_in_a_tar_is_listed(self, name, reason):
    _make_tar(self.tar, ('a/taken.txt', b'1'), ('x', b'2'))
    with tarfile.open(self.tar, 'w:gz') as archive:
      for each in ('a/taken.txt', name):
        info = tarfile.TarInfo(each)
        # The classic name field is cut at NUL, this one is not.
        info.pax_headers = {'path': each}
        archive.addfile(info)
    message = self._check_fails(
      r'a\.tgz is unsafe to extract .1 unsafe', self.tar
    )
    self.assertIn(f'{name[:200]!r} (', message)
    self.assertRegex(message, reason)

  @parameterized.parameters(*_BAD_NAMES)
  def test_an_unsafe_name_in_a_zip_is_listed(self, name, reason):
    info = zipfile.ZipInfo('x')
    info.filename = name  # The constructor would repair it.
    _make_zip(self.zip, ('a/taken.txt', b'1'), (info, b'2'))
    message = self._check_fails(
      r'a\.zip is unsafe to extract .1 unsafe', self.zip
    )
    self.assertIn(f'{name[:200]!r} (', message)
    self.assertRegex(message, reason)

  def test_an_empty_name_is_unsafe(self):
    info = zipfile.ZipInfo('x')
    info.filename = ''
    _make_zip(self.zip, (info, b'2'), ('x', b''))
    self._check_fails(r"1 unsafe .* '' \(not a name\)", self.zip)
    _make_tar(self.tar, ('', b'2'), ('x', b''))
    self._check_fails(r"1 unsafe .* '' \(not a name\)", self.tar)

  @parameterized.parameters(
    (tarfile.SYMTYPE, '/etc'),
    (tarfile.SYMTYPE, 'inside'),
    (tarfile.LNKTYPE, '../../a.tgz'),
    (tarfile.LNKTYPE, 'inside'),
    (tarfile.CHRTYPE, ''),
    (tarfile.BLKTYPE, ''),
    (tarfile.FIFOTYPE, ''),
    (tarfile.GNUTYPE_SPARSE, ''),
    (b'Z', ''),
  )
  def test_links_and_special_files_in_a_tar_are_refused(self, kind, target):
    _make_tar(
      self.tar,
      ('inside', b'x'),
      (_tar_info('odd', kind, target), b''),
      ('odd/under', b'x'),
    )
    self._check_fails(r"1 unsafe .*'odd' \(a link or special file\)", self.tar)

  def test_a_file_with_holes_is_refused(self):
    info = tarfile.TarInfo('holes')
    info.pax_headers = {'GNU.sparse.map': '0,1', 'GNU.sparse.size': '1000'}
    _make_tar(self.tar, (info, b'x'))
    self._check_fails(r"'holes' \(a link or special file\)", self.tar)

  @parameterized.parameters(
    stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK
  )
  def test_links_and_special_files_in_a_zip_are_refused(self, kind):
    _make_zip(
      self.zip, (_zip_info('odd', kind | 0o777), b'/etc'), ('odd/under', b'x')
    )
    self._check_fails(r"1 unsafe .*'odd' \(a link or special file\)", self.zip)

  def test_encrypted_members_and_unknown_methods_are_refused(self):
    _make_zip(self.zip, ('x', b'x'), ('y', b'y'))
    data = bytearray(self.zip.read_bytes())
    first = data.index(b'PK\1\2')
    second = data.index(b'PK\1\2', first + 1)
    data[first + 8] |= 1
    data[second + 10] = 99
    self.zip.write_bytes(data)
    self._check_fails(
      r"'x' \(encrypted\), 'y' \(compressed by method 99\)", self.zip
    )

  @parameterized.parameters('zip', 'tar')
  def test_all_unsafe_members_are_listed_at_once(self, kind):
    members = [(f'../{n:02d}', b'') for n in range(25)]
    members = [('fine', b'')] + members + [('fine too', b'')]
    path = self.zip if kind == 'zip' else self.tar
    (_make_zip if kind == 'zip' else _make_tar)(path, *members)
    message = self._check_fails('25 unsafe members', path)
    self.assertEqual(
      re.findall(r"'\.\./(\d\d)' \(leads", message),
      [f'{n:02d}' for n in range(20)],
    )
    self.assertTrue(message.endswith(' and others.'))
    self.assertNotIn('fine', message)

  @parameterized.parameters('zip', 'tar')
  def test_decompression_bombs_are_refused_before_extraction(self, kind):
    path = self.zip if kind == 'zip' else self.tar
    make = _make_zip if kind == 'zip' else _make_tar
    make(path, ('x', _IMAGE), ('zeros', bytes(10**7)), ('../y', b''))
    with mock.patch.object(archives, '_ALLOWANCE', 10**6):
      with mock.patch.object(archives, '_write', return_value='') as write:
        self._check_fails('exceeds a limit: more than .* bytes', path)
    self.assertLen(write.call_args_list, 1)
    self.assertLen(self._extract_fixed(path), 2)

  def _extract_fixed(self, path):
    """The same archive without its unsafe member is within the limits."""
    make = _make_zip if path == self.zip else _make_tar
    make(path, ('x', _IMAGE), ('zeros', bytes(10**7)))
    return self._extract(path)

  def test_the_limit_grows_with_the_archive(self):
    _make_tar(self.tar, ('x', _IMAGE), ('zeros', bytes(18 * len(_IMAGE))))
    with mock.patch.object(archives, '_ALLOWANCE', 10_000):
      self.assertLen(self._extract(self.tar), 2)
      _make_tar(self.tar, ('x', _IMAGE), ('zeros', bytes(10**5)))
      self.out.rename(self.base / 'first')
      self._check_fails('exceeds a limit', self.tar)

  @parameterized.parameters('zip', 'tar')
  def test_too_many_members_are_refused(self, kind):
    path = self.zip if kind == 'zip' else self.tar
    make = _make_zip if kind == 'zip' else _make_tar
    make(path, *((str(n), b'') for n in range(6)))
    with mock.patch.object(archives, 'MAX_MEMBERS', 5):
      self._check_fails('more than 5 members', path)
    with mock.patch.object(archives, 'MAX_MEMBERS', 6):
      self.assertLen(self._extract(path), 6)

  def test_a_negative_size_does_not_offset_a_bomb(self):
    link = _tar_info('l', tarfile.SYMTYPE, pax_headers={'size': '-9999999'})
    _make_tar(self.tar, (link, b''), ('zeros', bytes(10**6)))
    with mock.patch.object(archives, '_ALLOWANCE', 10**5):
      self._check_fails('negative size|invalid offset', self.tar)

  def test_a_negative_size_causes_no_endless_loop(self):
    info = _tar_info('x', tarfile.REGTYPE, pax_headers={'size': '-1024'})
    _make_tar(self.tar, ('first', b''), (info, b''), ('y', b''))
    self._check_fails('is damaged', self.tar)

  def test_bytes_after_the_last_member_count(self):
    _make_tar(self.tar, ('x', b'x'))
    data = gzip.decompress(self.tar.read_bytes())
    self.tar.write_bytes(gzip.compress(data + bytes(10**7)))
    with mock.patch.object(archives, '_ALLOWANCE', 10**6):
      self._check_fails('exceeds a limit', self.tar)

  def test_huge_headers_are_not_read_into_memory(self):
    info = tarfile.TarInfo('x')
    info.pax_headers = {'comment': 'c' * 2 * 10**6}
    _make_tar(self.tar, ('first', b''), (info, b''))
    self._check_fails('exceeds a limit: a header', self.tar)
    _make_zip(self.zip, *((str(n), b'') for n in range(10)))
    with mock.patch.object(archives, '_MAX_DIRECTORY', 400):
      self._check_fails('exceeds a limit: a header', self.zip)

  @parameterized.parameters((b'', 'not a zip or tar'), (b'x', 'is damaged'))
  def test_words_instead_of_numbers_in_headers_are_damage(self, first, message):
    info = tarfile.TarInfo('x')
    info.pax_headers = {'GNU.sparse.map': 'a,b', 'GNU.sparse.size': '1'}
    members = [('first', first)] if first else []
    _make_tar(self.tar, *members, (info, b''))
    self._check_fails(rf'a\.tgz .*{message}', self.tar)

  def test_nested_headers_end(self):
    header = _tar_info('././@LongLink', tarfile.GNUTYPE_LONGNAME, size=1)
    with gzip.open(self.tar, 'wb') as file:
      file.write((header.tobuf() + bytes(512)) * 2000)
    self._check_fails('is damaged', self.tar)

  @parameterized.parameters(
    (24, 500, 'declared size|Bad CRC'), (24, 50_000, 'Bad CRC|declared size')
  )
  def test_a_zip_with_a_wrong_size_is_damaged(self, field, size, reason):
    _make_zip(self.zip, ('x', _IMAGE))
    data = bytearray(self.zip.read_bytes())
    at = data.index(b'PK\1\2') + field
    data[at : at + 4] = struct.pack('<I', size)
    self.zip.write_bytes(data)
    self._check_fails(f'damaged: .*({reason}).*; download it again', self.zip)

  def test_no_more_than_the_declared_size_is_written(self):
    source = io.BytesIO(_IMAGE)
    for size in (len(_IMAGE) - 1, len(_IMAGE) + 1):
      with self.assertRaisesRegex(
        EOFError, "'x' does not have its declared size"
      ):
        archives._write(str(self.base), 'x', size, source)
      source.seek(0)
      self.assertLessEqual((self.base / 'x').stat().st_size, size)
      (self.base / 'x').unlink()

  @parameterized.parameters(1.0, 0.999, 0.9, 0.5, 0.2)
  def test_a_truncated_tgz_is_damaged(self, fraction):
    _make_tar(self.tar, *((str(n), _IMAGE) for n in range(30)))
    data = self.tar.read_bytes()
    self.tar.write_bytes(data[: int(fraction * len(data)) - 1])
    self._check_fails(r'a\.tgz is damaged: .*; download it again\.$', self.tar)

  @parameterized.parameters(512, 1024, 1536 + 3, 512 * 7, 512 * 14)
  def test_a_truncated_tar_is_damaged(self, length):
    _make_tar(self.tar, ('x', _IMAGE), ('y', _IMAGE), mode='w')
    self.tar.write_bytes(self.tar.read_bytes()[:length])
    self._check_fails(r'is damaged: .*; download it again\.$', self.tar)

  def test_a_broken_header_is_not_the_end_of_a_tar(self):
    _make_tar(self.tar, ('x', _IMAGE), ('y', _IMAGE), mode='w')
    data = bytearray(self.tar.read_bytes())
    data[512 * 7] ^= 1
    self.tar.write_bytes(data)
    self._check_fails('is damaged', self.tar)

  @parameterized.parameters(30, 200, 1500, -8)
  def test_a_flipped_bit_in_a_tgz_is_damage(self, position):
    _make_tar(self.tar, ('x', _IMAGE))
    data = bytearray(self.tar.read_bytes())
    data[position] ^= 4
    self.tar.write_bytes(data)
    self._check_fails('is damaged|is not a zip or tar', self.tar)

  def test_a_flipped_bit_in_a_zip_is_damage(self):
    _make_zip(self.zip, ('x', _IMAGE))
    data = bytearray(self.zip.read_bytes())
    data[1000] ^= 4
    self.zip.write_bytes(data)
    self._check_fails(r"is damaged: .*'x'.*; download it again", self.zip)

  def test_a_truncated_zip_is_damaged(self):
    _make_zip(self.zip, ('x', _IMAGE))
    self.zip.write_bytes(self.zip.read_bytes()[:-30])
    self._check_fails('is damaged', self.zip)

  def test_any_damage_is_a_value_error(self):
    rng = np.random.default_rng(3)
    _make_zip(self.zip, ('x', b'abc' * 9), ('y/', b''), ('ä', b''))
    _make_tar(self.base / 'a.tar', ('x', b'abc'), ('ä' * 200, b''), mode='w')
    _make_tar(self.tar, ('x', b'abc'), ('ä' * 200, b''))
    for path in (self.zip, self.tar, self.base / 'a.tar'):
      whole = np.frombuffer(path.read_bytes(), np.uint8)
      # The end of a tar is padding, where changes are harmless.
      used = np.flatnonzero(whole)
      for _ in range(200):
        data = whole.copy()
        at = rng.choice(used, 3)
        data[at] = rng.integers(0, 256, 3)
        path.write_bytes(data.tobytes())
        try:
          self._extract(path)
          shutil.rmtree(self.out)
        except ValueError as error:
          self.assertIn(path.name, str(error))
          self.assertFalse(self.out.exists())

  @parameterized.parameters(b'', b'words', bytes(20), b'GIF89a' + bytes(2000))
  def test_files_that_are_not_archives_are_named(self, content):
    path = self.base / 'page.tgz'
    path.write_bytes(content)
    self._check_fails(r'page\.tgz is not a zip or tar archive', path)
    path.write_bytes(gzip.compress(content))
    self._check_fails(r'page\.tgz is not a zip or tar archive', path)

  def test_a_git_lfs_pointer_is_named(self):
    path = self.base / 'pointer.zip'
    path.write_text('version https://git-lfs.github.com/spec/v1\noid x\n')
    self._check_fails(r'pointer\.zip is a Git LFS pointer', path)

  @parameterized.parameters('zip', 'tar', 'zeros')
  def test_an_archive_without_members_is_damaged(self, kind):
    if kind == 'zip':
      _make_zip(self.zip)
    elif kind == 'tar':
      _make_tar(self.zip)
    else:
      self.zip.write_bytes(bytes(5000))
    self._check_fails('is damaged: it is empty', self.zip)

  def test_leftovers_of_an_interrupted_run_are_removed(self):
    part = self.out.parent / 'out.part'
    (part / 'a').mkdir(parents=True)
    (part / 'a' / 'x').write_bytes(b'old')
    (part / 'stray').write_bytes(b'old')
    _make_tar(self.tar, ('a/x', b'new'))
    self.assertEqual(self._extract(self.tar), {'a/x': b'new'})

  def test_a_full_disk_is_not_reported_as_damage(self):
    _make_tar(self.tar, ('x', b'x'))

    def refuse(path, mode):
      if mode == 'xb':
        raise OSError(errno.ENOSPC, 'No space left on device')
      return open(path, mode)

    with mock.patch.object(archives, 'open', refuse, create=True):
      with self.assertRaisesRegex(OSError, 'No space left'):
        self._extract(self.tar)
    self.assertEmpty(os.listdir(self.out.parent))

  def test_progress_is_printed_only_on_a_terminal(self):
    _make_tar(self.tar, ('x', b'x'))
    with contextlib.redirect_stderr(io.StringIO()) as printed:
      self._extract(self.tar)
    self.assertEqual(printed.getvalue(), '')

  def test_an_interruption_leaves_nothing(self):
    _make_tar(self.tar, ('x', b'x'), ('y', b'y'))
    with mock.patch.object(archives, '_write', side_effect=KeyboardInterrupt):
      with self.assertRaises(KeyboardInterrupt):
        self._extract(self.tar)
    self.assertEmpty(os.listdir(self.out.parent))

  @parameterized.parameters('', '/')
  def test_an_existing_folder_is_not_touched(self, end):
    self.out.mkdir()
    (self.out / 'mine').write_bytes(b'mine')
    _make_tar(self.tar, ('x', b'x'))
    with self.assertRaisesRegex(ValueError, 'already exists'):
      archives.extract([str(self.tar)], str(self.out) + end)
    self.assertEqual(os.listdir(self.out), ['mine'])
    self.assertEqual(os.listdir(self.out.parent), ['out'])

  def test_headers_of_a_tar_are_not_kept_in_memory(self):
    _make_tar(self.tar, *((f'header{n}', b'') for n in range(500)))
    alive = []

    def count(folder, name, *_):
      if name == 'header499':
        gc.collect()  # What `_make_tar` left behind.
        alive.extend(
          each
          for each in gc.get_objects()
          # Other tests of this process hold headers of their own.
          if isinstance(each, tarfile.TarInfo) and 'header' in each.name
        )
      return ''

    with mock.patch.object(archives, '_write', count):
      self._extract(self.tar)
    self.assertBetween(len(alive), 1, 5)


class FindTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.base = pathlib.Path(self.create_tempdir().full_path)

  def _touch(self, *names):
    for name in names:
      (self.base / name).parent.mkdir(parents=True, exist_ok=True)
      (self.base / name).write_bytes(b'')

  def _find_file(self, *names):
    path = archives.find_file(str(self.base), names)
    return path and os.path.relpath(path, self.base)

  def _find_root(self, *markers):
    path = archives.find_root(str(self.base), markers)
    return path and os.path.relpath(path, self.base)

  def test_the_shallowest_then_first_file_is_found(self):
    self._touch('b/c/x.tgz')
    self.assertEqual(self._find_file('x.tgz'), 'b/c/x.tgz')
    self._touch('b/x.tgz')
    self.assertEqual(self._find_file('x.tgz'), 'b/x.tgz')
    self._touch('a/x.tgz', 'a/A.zip', 'a/a/x.tgz')
    self.assertEqual(self._find_file('x.tgz'), 'a/x.tgz')
    self.assertEqual(self._find_file('x.tgz', 'a.ZIP'), 'a/A.zip')
    self._touch('X.TGZ')
    self.assertEqual(self._find_file('x.tgz'), 'X.TGZ')

  def test_only_files_of_that_name_are_found(self):
    self._touch('x.tgz.part', 'ax.tgz', 'a/b/c/x.tgz', '.hidden/x.tgz')
    (self.base / 'd' / 'x.tgz').mkdir(parents=True)
    (self.base / 'x.tgz').symlink_to('nowhere')
    self.assertIsNone(self._find_file('x.tgz'))
    self.assertIsNone(archives.find_file('/nowhere', ['x']))

  def test_the_shallowest_folder_with_all_markers_is_found(self):
    self._touch('a/b/c/CUB/images.txt')
    self.assertIsNone(self._find_root('CUB/images.txt', 'CUB/images'))
    (self.base / 'a/b/c/CUB/images').mkdir()
    self.assertEqual(self._find_root('CUB/images.txt', 'CUB/images'), 'a/b/c')
    self._touch('b/CUB/images.txt', 'b/CUB/images/1.jpg')
    self.assertEqual(self._find_root('CUB/images.txt', 'CUB/images'), 'b')
    self._touch('CUB/images.txt')
    self.assertEqual(self._find_root('CUB/images.txt', 'CUB/images'), 'b')
    (self.base / 'CUB/images').mkdir()
    self.assertEqual(self._find_root('CUB/images.txt', 'CUB/images'), '.')

  def test_hidden_deep_and_linked_folders_are_not_searched(self):
    self._touch('.hidden/mark', 'a/b/c/d/mark')
    elsewhere = pathlib.Path(self.create_tempdir().full_path)
    (elsewhere / 'mark').write_bytes(b'')
    (self.base / 'link').symlink_to(elsewhere)
    self.assertIsNone(self._find_root('mark'))
    self.assertIsNone(self._find_file('mark'))
    self.assertIsNone(archives.find_root('/nowhere', ['mark']))
    self.base = self.base / 'link'
    self.assertEqual(self._find_root('mark'), '.')
    self.assertEqual(self._find_file('mark'), 'mark')

  def test_the_deepest_folders_are_not_listed(self):
    self._touch('a/b/c/d')
    with mock.patch.object(archives, '_list', wraps=archives._list) as seen:
      self.assertIsNone(self._find_root('mark'))
    listed = [os.path.relpath(c.args[0], self.base) for c in seen.mock_calls]
    self.assertEqual(listed, ['.', 'a', 'a/b'])

  def test_an_unreadable_folder_is_skipped(self):
    self._touch('a/x', 'b/x')
    scandir = os.scandir

    def refuse(path):
      if os.path.basename(path) == 'a':
        raise PermissionError(errno.EACCES, 'Permission denied')
      return scandir(path)

    with mock.patch.object(os, 'scandir', refuse):
      self.assertEqual(self._find_file('x'), 'b/x')


if __name__ == '__main__':
  absltest.main()
