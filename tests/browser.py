"""Chromium for tests of pages."""

import pathlib
import shutil
import tempfile

from absl.testing import absltest

_CHROMIUM = shutil.which('chromium')
_DRIVER = shutil.which('chromedriver')

needed = absltest.skipUnless(
  _CHROMIUM and _DRIVER, 'Needs Chromium: apt install chromium-driver.'
)


def start(test_class: type[absltest.TestCase]):
  """Returns a driver that ends with the tests of a class."""
  from selenium import webdriver

  profile = pathlib.Path(tempfile.mkdtemp())
  test_class.addClassCleanup(shutil.rmtree, profile, ignore_errors=True)
  options = webdriver.ChromeOptions()
  options.binary_location = _CHROMIUM
  for flag in (
    'headless',
    'no-sandbox',
    'disable-gpu',
    'disable-quic',
    'no-first-run',
    'disable-background-networking',
    'disable-component-update',
    'disable-sync',
    'disable-dev-shm-usage',
    f'user-data-dir={profile}',
    'window-size=1200,1000',
  ):
    options.add_argument(f'--{flag}')
  options.set_capability(
    'goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'}
  )
  driver = webdriver.Chrome(
    options, webdriver.ChromeService(executable_path=_DRIVER)
  )
  test_class.addClassCleanup(driver.quit)
  return driver
