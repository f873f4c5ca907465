"Everything is read from settings.ini, so that nbdev and pip never disagree"
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
classifiers = [
    {'3': 'Development Status :: 3 - Alpha', '4': 'Development Status :: 4 - Beta'}[cfg['status']],
    f"Intended Audience :: {cfg['audience']}", f"Natural Language :: {cfg['language']}",
    'Topic :: Scientific/Engineering :: Artificial Intelligence'
] + [f'Programming Language :: Python :: 3.{v}' for v in range(int(cfg['min_python'].split('.')[1]), 14)]

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    license={'apache2': 'Apache-2.0'}[cfg['license']], classifiers=classifiers,
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require={'lab': cfg['lab_requirements'].split(), 'harness': cfg['harness_requirements'].split(),
                    'dev': ' '.join(cfg[f'{o}_requirements'] for o in ('lab', 'harness', 'dev')).split()},
    packages=find_packages(include=['sdlab', 'sdlab.*'], exclude=['sdlab.maintain', 'sdlab.maintain.*']),   # a maintainer's tools stay in the checkout
    package_data={'': ['assets/**/*', 'py.typed']}, include_package_data=True, zip_safe=False,
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]})
