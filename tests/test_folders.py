import os
import pathlib
import socket
from unittest import mock

from absl.testing import absltest, parameterized

from proxy_nca_jax.runtime import folders


class ListFilesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self._write('a/1', 'a/deep/2', 'b/3', 'top')

  def _write(self, *names):
    for name in names:
      path = self.root / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(name)

  def _list(self):
    return folders.list_files(str(self.root))

  def test_regular_files_are_listed_in_order(self):
    self._write('.hidden', 'a/.hidden/x', 'a/Thumbs.db')
    listing = self._list()
    self.assertEqual([*listing.files], ['a/1', 'a/deep/2', 'b/3', 'top'])
    self.assertEqual(listing.files['a/1'].st_size, 3)
    self.assertEqual(listing[1:], ({}, {}, {}))

  def test_special_files_are_skipped_by_name(self):
    os.mkfifo(self.root / 'a' / 'pipe')
    (self.root / 'a' / 'zero').symlink_to('/dev/zero')
    with socket.socket(socket.AF_UNIX) as server:
      server.bind(str(self.root / 'a' / 'sock'))
    listing = self._list()
    self.assertLen(listing.files, 4)
    self.assertEqual(
      listing.skipped,
      {
        'a/pipe': 'a named pipe, not a regular file',
        'a/sock': 'a socket, not a regular file',
        'a/zero': 'a device, not a regular file',
      },
    )

  def test_links_are_followed_without_loops(self):
    elsewhere = pathlib.Path(self.create_tempdir().full_path)
    (elsewhere / 'x').write_text('')
    (self.root / 'c').symlink_to(elsewhere)
    (self.root / 'a' / '0').symlink_to('deep')
    (self.root / 'a' / 'deep' / 'up').symlink_to('..')
    (self.root / 'b' / 'root').symlink_to(self.root)
    (self.root / 'b' / 'all').symlink_to('/')
    (self.root / 'b' / 'self').symlink_to('self')
    listing = self._list()
    self.assertEqual([*listing.files], ['a/1', 'a/deep/2', 'b/3', 'c/x', 'top'])
    self.assertSameElements(
      listing.skipped, ['a/0', 'a/deep/up', 'b/root', 'b/all']
    )
    self.assertIn('symbolic links', listing.unreachable['b/self'])

  def test_a_tree_of_links_ends(self):
    for level in range(40):
      for name in 'xy':
        folder = self.root / 'tree' / str(level)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(f'../{level + 1}')
    self._write('tree/40/leaf')
    self.assertIn('tree/40/leaf', self._list().files)

  def test_two_linked_classes_both_have_the_files(self):
    for name in ('l', 'm'):
      (self.root / name).symlink_to('a')
    files = self._list().files
    self.assertContainsSubset(['a/1', 'l/1', 'l/deep/2', 'm/deep/2'], files)

  def test_folders_that_cannot_be_listed_are_named(self):
    scandir = os.scandir

    def refuse(path):
      if path.endswith('deep'):
        raise PermissionError(13, 'Permission denied', path)
      return scandir(path)

    (self.root / 'gone').symlink_to('/nowhere/disk')
    with mock.patch.object(os, 'scandir', refuse):
      listing = self._list()
    self.assertEqual([*listing.files], ['a/1', 'b/3', 'top'])
    self.assertEqual(listing.unlisted, {'a/deep': 'Permission denied'})
    self.assertEqual(listing.unreachable, {'gone': 'a link to nothing'})


class ReadFileTest(absltest.TestCase):
  def test_only_regular_files_of_a_bounded_size_are_read(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    (root / 'file').write_bytes(b'content')
    self.assertEqual(folders.read_file(root / 'file'), b'content')
    os.mkfifo(root / 'pipe')
    for path, reason in (
      (root / 'pipe', 'a named pipe'),
      ('/dev/zero', 'a device'),
      (root, 'a folder'),
    ):
      with self.assertRaisesRegex(ValueError, f'{reason}, not a regular file'):
        folders.read_file(path)
    os.truncate(root / 'file', 2**40)  # Sparse.
    with self.assertRaisesRegex(ValueError, '1,099,511,627,776 bytes'):
      folders.read_file(root / 'file')


class EscapeTest(parameterized.TestCase):
  @parameterized.parameters(
    (b'a/b.png', 'a/b.png'),
    ('Ünï'.encode(), 'Ünï'),
    (b'caf\xe9', r'caf\xe9'),
    (rb'caf\xe9', r'caf\\xe9'),
    (b'\\\xff\xc3', r'\\\xff\xc3'),
  )
  def test_names_are_escaped_and_restored(self, name, escaped):
    path = os.fsdecode(name)
    self.assertEqual(folders.escape(path), escaped)
    escaped.encode()
    self.assertEqual(folders.unescape(escaped), path)

  def test_the_locale_changes_no_escaped_name(self):
    path = 'Ünï'.encode().decode('ascii', 'surrogateescape')
    with (
      mock.patch.object(
        os, 'fsencode', lambda x: x.encode('ascii', 'surrogateescape')
      ),
      mock.patch.object(
        os, 'fsdecode', lambda x: x.decode('ascii', 'surrogateescape')
      ),
    ):
      self.assertEqual(folders.escape(path), 'Ünï')
      self.assertEqual(folders.unescape('Ünï'), path)

  def test_a_path_that_libraries_refuse_is_one_clear_error(self):
    folders.check_utf8('Ünï', 'The workdir')
    with self.assertRaisesRegex(ValueError, r'The workdir is "caf\\xe9"'):
      folders.check_utf8(os.fsdecode(b'caf\xe9'), 'The workdir')


if __name__ == '__main__':
  absltest.main()
